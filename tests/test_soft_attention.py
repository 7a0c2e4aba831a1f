"""The soft-attention baseline: the same call signature, equations by hand, all memories, all gradients."""

import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO

from vma_pyro import ConvNetworks, Memory, MLPNetworks
from vma_pyro.comparisons import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.evaluation import classify_by_attention, log_likelihood
from vma_pyro.infer import MultiSampleELBO

B, S, K = 3, 5, 4
shared_or_not = pytest.mark.parametrize("shared", [True, False])
guided_or_not = pytest.mark.parametrize("target_guided", [True, False])


def build(target_guided, kind="mlp"):
    if kind == "conv":
        networks = ConvNetworks(6, width=0.1, key_dim=8, hidden_dim=8)
    else:
        networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    return SoftAttentionModel(networks, hidden_dim=9), SoftAttentionGuide(networks, target_guided=target_guided)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@guided_or_not
@shared_or_not
def test_every_parameter_learns_from_the_multi_sample_bound(kind, target_guided, shared, random_images):
    model, guide = build(target_guided, kind)
    memory, x = Memory(random_images(S) if shared else random_images(B, S)), random_images(B)
    loss_fn = MultiSampleELBO(K, max_plate_nesting=1)(model, guide)
    with torch.no_grad():
        for name, p in loss_fn.named_parameters():
            if name.endswith("bias"):
                p.normal_()  # a blank image under zero biases has no features, and nothing to learn from
    loss_fn(memory, x).backward()
    silent = {n for n, p in loss_fn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == set()


@guided_or_not
@shared_or_not
def test_the_bound_is_that_of_the_equations(target_guided, shared, random_images):
    model, guide = build(target_guided)
    networks = model.networks
    entries, x = random_images(S) if shared else random_images(B, S), random_images(B)
    guide_trace = poutine.trace(guide).get_trace(entries, x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(entries, x)
    z = guide_trace.nodes["z"]["value"]
    keys = networks.encode(entries.reshape(-1, 1, 28, 28)).key.reshape(*entries.shape[:-3], -1)
    blank = networks.heads(networks.encode(torch.zeros(1, 1, 28, 28)))
    for b in range(B):
        own = keys if shared else keys[b]
        centre = own.mean(0)

        def weights(query, similarity, own=own, centre=centre):
            cosine = F.cosine_similarity((query - centre)[None], own - centre)
            return (similarity.log_scale.exp() * cosine).softmax(0)

        features = networks.heads(networks.encode(entries if shared else entries[b]))
        pi = weights(model.to_query(z[b]), model.similarity)
        stem = (pi[:, None] * features.stem).sum(0)
        logits = networks.decode(z[b][None], features._replace(stem=stem[None], skips=()))
        expected = -F.binary_cross_entropy_with_logits(logits[0], x[b], reduction="sum")
        torch.testing.assert_close(model_trace.nodes["x"]["fn"].log_prob(x)[b], expected)
        query = networks.query(x[b][None])
        hidden = blank.hidden
        if target_guided:
            hidden = (weights(query.key[0], guide.similarity)[:, None] * features.hidden).sum(0)[None]
        loc = networks.posterior(query, features._replace(hidden=hidden)).mean
        torch.testing.assert_close(guide_trace.nodes["z"]["fn"].base_dist.loc[b], loc[0])


def test_one_entry_leaves_nothing_to_choose(random_images):
    model, guide = build(False)
    entry, x = random_images(1), random_images(B)
    twice = log_likelihood(model, guide, entry.expand(2, -1, -1, -1), x, num_samples=3)
    torch.testing.assert_close(twice, log_likelihood(model, guide, entry, x, num_samples=3))


@guided_or_not
def test_generates_and_runs_under_pyros_own_objectives(target_guided, random_images):
    model, guide = build(target_guided)
    assert model(random_images(S), num_images=B).shape == (B, 1, 28, 28)
    with pyro.plate("particles", K, dim=-2):
        assert model(random_images(B, S)).shape == (K, B, 1, 28, 28)
    for vectorize in (True, False):
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
        assert math.isfinite(elbo(model, guide)(random_images(S), random_images(B)).item())


def test_bad_images_are_refused_in_one_line(random_images):
    model, guide = build(True)
    for program in (model, guide):
        with pytest.raises(ValueError, match=r"^x: expected shape \[B, 1, 28, 28\]"):
            program(random_images(S), torch.zeros(B, 1, 20, 20))


@pytest.mark.parametrize("target_guided", [False, True])
def test_classes_by_attention_are_the_weights_of_the_read(target_guided, random_images, monkeypatch):
    model, guide = build(target_guided)
    labels = torch.tensor([0, 1, 2, 1, 0])
    entries, x = torch.stack([random_images(5) for _ in range(4)]), random_images(4)
    found = classify_by_attention(model, guide, Memory(entries, labels.expand(4, -1)), x, num_samples=2000)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    shared = [classify_by_attention(model, guide, Memory(own, labels), x, num_samples=2000) for own in entries]
    torch.testing.assert_close(found, torch.stack([shared[i][i] for i in range(4)]), rtol=0, atol=0.03)

    # All the weight on one entry: its class has all the probability.
    monkeypatch.setattr(model, "attention", lambda z, m: torch.eye(5)[2].expand(*z.shape[:-1], 5))
    certain = classify_by_attention(model, guide, Memory(entries[0], labels), x, num_classes=4, num_samples=3)
    assert torch.equal(certain, torch.eye(4)[2].expand(4, 4))
