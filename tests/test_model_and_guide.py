"""Model and guide, unedited, under everything that Pyro offers for such programs."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from torch import nn

from vma_pyro import (
    ConvNetworks,
    CosineSimilarity,
    Guide,
    InnerProduct,
    LearnedAddress,
    Memory,
    MLPNetworks,
    Model,
)
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.infer import MultiSampleELBO, log_weights, log_weights_given, loo

B, S, K = 3, 5, 4


def build(kind="mlp", **options):
    if kind == "conv":
        networks = ConvNetworks(6, width=0.1, key_dim=8, hidden_dim=8)
    else:
        networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    return Model(networks, **options), Guide(networks)


def make_memory(random_images, shared):
    return Memory(random_images(S) if shared else random_images(B, S))


def every_parameter_has_a_gradient(*modules):
    parameters = {id(p): (n, p) for m in modules for n, p in m.named_parameters()}.values()
    return [n for n, p in parameters if p.grad is None or not p.grad.abs().sum() > 0]


class Transpose(nn.Module):
    def forward(self, values):
        return values.T


shared_or_not = pytest.mark.parametrize("shared", [True, False])
both_networks = pytest.mark.parametrize("kind", ["mlp", "conv"])


@both_networks
@shared_or_not
def test_forward_sampling(kind, shared, random_images):
    model, _ = build(kind)
    memory = make_memory(random_images, shared)
    x = model(memory) if not shared else model(memory, num_images=B)
    assert x.shape == (B, 1, 28, 28)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    with pyro.plate("particles", K, dim=-2):
        assert model(memory, num_images=B).shape == (K, B, 1, 28, 28)


@both_networks
@shared_or_not
@pytest.mark.parametrize("vectorize", [True, False])
def test_multi_sample_elbo(kind, shared, vectorize, random_images):
    model, guide = build(kind)
    memory, x = make_memory(random_images, shared), random_images(B)
    loss_fn = MultiSampleELBO(K, baseline=loo, max_plate_nesting=1, vectorize_particles=vectorize)(model, guide)
    loss_fn(memory, x).backward()
    assert every_parameter_has_a_gradient(model, guide) == []


@shared_or_not
@pytest.mark.parametrize("vectorize", [True, False])
def test_trace_elbo(shared, vectorize, random_images):
    model, guide = build()
    memory, x = make_memory(random_images, shared), random_images(B)
    elbo = Trace_ELBO(num_particles=K, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo(model, guide)(memory, x).backward()
    assert every_parameter_has_a_gradient(model, guide) == []


@both_networks
@shared_or_not
@pytest.mark.parametrize("particles", [1, K])
def test_trace_enum_elbo_with_the_address_enumerated(kind, shared, particles, random_images):
    model, guide = build(kind)
    memory, x = make_memory(random_images, shared), random_images(B)
    elbo = TraceEnum_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    elbo.differentiable_loss(model, config_enumerate(guide), memory, x).backward()
    assert every_parameter_has_a_gradient(model, guide) == []


@shared_or_not
@pytest.mark.parametrize("neural", [False, True])
@pytest.mark.parametrize("vectorize", [False, True])
def test_trace_graph_elbo_with_baselines(shared, neural, vectorize, random_images):
    model, guide = build()
    memory, x = make_memory(random_images, shared), random_images(B)
    shape = (2, B) if vectorize else (B,)  # Pyro wants the baseline in the shape of the site
    baseline_network = nn.Sequential(nn.Flatten(), nn.Linear(784, shape[0] if vectorize else 1))
    as_site = nn.Sequential(baseline_network, Transpose() if vectorize else nn.Flatten(0))
    if neural:
        baseline = {"nn_baseline": as_site, "nn_baseline_input": x}
    else:
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
    guided = poutine.infer_config(guide, lambda site: {"baseline": baseline} if site["name"] == "address" else {})
    elbo = TraceGraph_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    for _ in range(2):  # the decaying average starts at zero
        loss = elbo.loss_and_grads(model, guided, memory, x)
    assert math.isfinite(loss)
    assert every_parameter_has_a_gradient(model, guide) == []
    if neural:
        assert baseline_network[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("elbo", [Trace_ELBO(), MultiSampleELBO(3), TraceGraph_ELBO()])
def test_svi_moves_every_parameter(elbo, random_images):
    """With Pyro's default, the global parameter store: in Pyro 1.9 SVI.step fails on local plain parameters."""
    memory, x = make_memory(random_images, True), random_images(B)
    with pyro.settings.context(module_local_params=False):
        model, guide = build()
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = [svi.step(memory, x) for _ in range(2)]
        moved = [n for n, p in guide.named_parameters() if (p.detach() != before[n]).any()]
    assert all(map(math.isfinite, losses))
    assert sorted(moved) == sorted(before)


@shared_or_not
def test_predictive(shared, random_images):
    model, guide = build()
    memory, x = make_memory(random_images, shared), random_images(B)
    for parallel in (True, False):
        prior = Predictive(model, num_samples=K, parallel=parallel)(memory, num_images=B)
        assert prior["x"].shape == (K, B, 1, 28, 28)
        assert prior["address"].shape[0] == K
        posterior = Predictive(model, guide=guide, num_samples=K, parallel=parallel)(memory, x)
        assert posterior["address"].shape == (K, B)
        assert posterior["z"].shape == (K, B, 4)


class TestTheAddressGradient:
    """Three estimators of the ELBO's gradient, on the parameters of q(a | x) alone.

    The others would drown the score part, which REINFORCE scales by log w: each sampled estimator has a constant
    baseline near the mean of log w.
    """

    TRIALS = 60
    COPIES = 400  # of each image in one trial

    def projections(self, parameters, backward):
        """Gradients along six random directions, [trials, 6]."""
        torch.manual_seed(1)
        directions = [torch.randn(6, *p.shape) for p in parameters]
        rows = []
        for _ in range(self.TRIALS):
            for p in parameters:
                p.grad = None
            backward()
            pairs = zip(directions, parameters, strict=True)
            rows.append(sum((d * p.grad).reshape(6, -1).sum(1) for d, p in pairs))
        return torch.stack(rows)

    def z_scores(self, one, other):
        return (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / self.TRIALS).sqrt()

    def test_enumeration_agrees_with_the_score_function(self, random_images):
        pyro.enable_validation(False)
        model, guide = build()
        memory, x = Memory(random_images(S)), random_images(B).repeat(self.COPIES, 1, 1, 1)
        parameters = [*guide.networks.to_key.parameters(), *guide.similarity.parameters()]
        typical = log_weights(model, guide, (memory, x), num_particles=2).mean().item()
        ours = MultiSampleELBO(1, baseline=lambda log_w: torch.full_like(log_w, typical), max_plate_nesting=1)
        # Pyro's score term has the same log p(x | z, m) and KL terms in it, hence the same constant.
        baseline = {"baseline": {"baseline_value": torch.full((len(x),), typical)}}
        guided = poutine.infer_config(guide, lambda site: baseline if site["name"] == "address" else {})
        graph, enumeration = TraceGraph_ELBO(max_plate_nesting=1), TraceEnum_ELBO(max_plate_nesting=1)

        enumerated = self.projections(
            parameters,
            lambda: enumeration.differentiable_loss(model, config_enumerate(guide), memory, x).backward(),
        )
        samplers = {
            "ours": lambda: ours.differentiable_loss(model, guide, memory, x).backward(),
            "graph": lambda: graph.loss_and_grads(model, guided, memory, x),
        }
        for name, backward in samplers.items():
            sampled = self.projections(parameters, backward)
            assert self.z_scores(enumerated, sampled).abs().max() < 4, name
            # The comparison has power: half the gradient, none, or one of the other sign would not pass.
            for wrong in (0.5, 0.0, -1.0):
                assert self.z_scores(enumerated, wrong * sampled).abs().max() > 5, (name, wrong)


@both_networks
def test_a_shared_memory_equals_copies_of_it(kind, random_images):
    model, guide = build(kind)
    entries, x = random_images(S), random_images(B)
    address = torch.arange(S)
    weights = []
    for memory in (Memory(entries), Memory(entries.expand(B, -1, -1, -1, -1))):
        torch.manual_seed(5)
        given = log_weights_given({"address": address}, model, guide, (memory, x), num_particles=K)
        assert given.shape == (S, K, B)
        torch.manual_seed(5)
        weights.append((given, log_weights(model, guide, (memory, x), num_particles=K)))
    torch.testing.assert_close(weights[0][0], weights[1][0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weights[0][1], weights[1][1], rtol=1e-4, atol=1e-3)


def test_priors_and_similarities(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    prior = LearnedAddress(networks, hidden_dim=5)
    for similarity in (InnerProduct(), CosineSimilarity(centred=False), CosineSimilarity()):
        model, guide = Model(networks, address_prior=prior), Guide(networks, similarity=similarity)
        for memory in (Memory(random_images(S)), Memory(random_images(B, S))):
            loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(model, guide)
            loss_fn.zero_grad()
            loss_fn(memory, random_images(B)).backward()
            assert every_parameter_has_a_gradient(model, guide) == []


def test_one_entry_costs_nothing_to_address(random_images):
    model, guide = build()
    trace = poutine.trace(guide).get_trace(Memory(random_images(1)), random_images(B))
    assert trace.nodes["address"]["fn"].logits.log_softmax(-1).abs().max() == 0


def test_the_memoryless_model_ignores_the_memory(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model, guide = MemorylessModel(networks), MemorylessGuide(networks)
    x = random_images(B)
    weights = []
    for memory in (None, Memory(random_images(S)), random_images(B, S)):
        torch.manual_seed(0)
        weights.append(log_weights(model, guide, (memory, x), num_particles=K))
    assert (weights[0] == weights[1]).all()
    assert (weights[0] == weights[2]).all()
    assert model(None, num_images=2).shape == (2, 1, 28, 28)
    MultiSampleELBO(2)(model, guide)(None, x).backward()
    assert networks.stem.weight.grad.abs().sum() > 0


class TestErrors:
    def test_image_shape_and_batch(self, random_images):
        model, guide = build()
        x = random_images(B)
        for program in (model, guide):
            with pytest.raises(ValueError, match=r"^x: expected shape \[B, 1, 28, 28\] like the memory's"):
                program(Memory(random_images(S)), x[:, 0])
            with pytest.raises(ValueError, match=r"^x: expected shape \[B, 1, 14, 14\]"):
                program(Memory(random_images(S, side=14)), x)
            with pytest.raises(ValueError, match="^x: expected 4 datapoints, one per memory, got 3"):
                program(Memory(random_images(4, S)), x)

    def test_networks_of_another_image_size(self, random_images):
        model, guide = build("conv")
        with pytest.raises(ValueError, match=r"^images: expected shape \[N, 1, 28, 28\], got \[5, 1, 14, 14\]$"):
            guide(Memory(random_images(S, side=14)), random_images(B, side=14))

    def test_images_that_are_not_binary(self, random_images):
        model, _ = build()
        with pytest.raises(ValueError, match=r"^x: expected binary values 0 and 1, got values from 0 to 0.5$"):
            model(Memory(random_images(S)), random_images(B) / 2)
        with pytest.raises(ValueError, match=r"^x: expected binary values 0 and 1"):
            MemorylessModel(model.networks)(None, random_images(B) / 2)

    def test_nan(self, random_images):
        model, guide = build()
        x = random_images(B)
        x[0, 0, 0, 0] = math.nan
        for program in (model, guide):
            with pytest.raises(ValueError, match=r"^x: expected finite values, got 1 NaN or infinite of 2352$"):
                program(Memory(random_images(S)), x)
