"""Memories of different sizes in one batch: the figures of one call per datapoint on its own unpadded memory."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from padded import SIZES, S, WithoutNoise, log_terms, setting, spread
from torch import nn

from vma_pyro import AddressIndex, ConvNetworks, Guide, InnerProduct, Memory, Model
from vma_pyro._system.ranks import Ranks
from vma_pyro.comparisons import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import Episode
from vma_pyro.evaluation import (
    address_posterior,
    classify,
    classify_by_attention,
    classify_by_likelihood,
    kl_report,
    log_likelihood,
    split_bound,
)
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.memory.selected import SelectedMemory
from vma_pyro.training.processes import take_share

VARIANTS = {
    "as shipped": {},
    "holes, inner product": {"holes": True, "similarity": InnerProduct(scale=0.5)},
    "convolutions, learned prior": {"networks": ConvNetworks(2, width=0.1, key_dim=6), "learned_prior": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_prior_posterior_classes_and_kl(variant):
    model, guide, own, padded, x = setting(**VARIANTS[variant])
    prior = pyro.poutine.trace(model).get_trace(padded, x).nodes["address"]["fn"].probs
    posterior, classes = address_posterior(guide, padded, x), classify(guide, padded, x, num_classes=3)
    report = kl_report(model, guide, padded, x, num_samples=2, labels=torch.tensor([0, 1, 2, 0]))
    split = split_bound(model, guide, padded, x, num_samples=2)
    assert (posterior[~padded.mask] == 0).all()
    assert (prior[~padded.mask] == 0).all()
    shares, right = [], []
    for b, memory in enumerate(own):
        image = x[b : b + 1]
        alone = pyro.poutine.trace(model).get_trace(memory, image).nodes["address"]["fn"].probs.flatten()
        p, q = alone, address_posterior(guide, memory, image)[0]
        torch.testing.assert_close(prior[b], spread(p, padded.mask[b]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(posterior[b], spread(q, padded.mask[b]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            classes[b], classify(guide, memory, image, num_classes=3)[0], atol=1e-5, rtol=1e-4
        )
        kl = (q * (q / p).log()).sum().item()
        assert split.kl_address[b].item() == pytest.approx(kl, abs=1e-4)
        shares.append(kl / math.log(SIZES[b]) if SIZES[b] > 1 else kl)
        right.append(q[memory.labels == (0, 1, 2, 0)[b]].sum().item())
    assert report.kl_address_share.mean == pytest.approx(sum(shares) / 4, abs=1e-4)
    assert report.right_class.mean == pytest.approx(sum(right) / 4, abs=1e-4)
    assert report.log_memory == pytest.approx(sum(map(math.log, SIZES)) / 4)
    assert padded.num_entries.tolist() == list(SIZES)


def test_likelihoods_are_those_of_each_datapoint_alone():
    model, guide, own, padded, x = setting(holes=True)
    sums = [log_terms(model, guide, memory, x[b : b + 1])[0].logsumexp(0) for b, memory in enumerate(own)]
    exact = log_likelihood(model, guide, padded, x, num_samples=3, address="exact")
    torch.testing.assert_close(exact, torch.stack(sums), rtol=1e-5, atol=0)
    sampled = log_likelihood(model, guide, padded, x, num_samples=4000)
    torch.testing.assert_close(sampled, torch.stack(sums), rtol=0, atol=0.4)  # of about 550 nats; weights differ
    by_model = classify_by_likelihood(model, guide, padded, x, num_samples=1, num_classes=3)
    for b, memory in enumerate(own):
        posterior = log_terms(model, guide, memory, x[b : b + 1])[0].softmax(0)
        expected = torch.zeros(3, dtype=torch.float64).scatter_add_(0, memory.labels, posterior)
        torch.testing.assert_close(by_model[b], expected, atol=1e-3, rtol=1e-3)


def test_a_shared_memory():
    model, guide, own, padded, x = setting(learned_prior=True)
    mask = torch.tensor([True, False, True, True, False, True])
    shared = Memory(padded.entries[3], own[3].labels, mask=mask)
    alone = Memory(own[3].entries[mask], own[3].labels[mask])
    torch.testing.assert_close(address_posterior(guide, shared, x)[:, mask], address_posterior(guide, alone, x))
    torch.testing.assert_close(
        *(log_likelihood(model, guide, memory, x, num_samples=1, address="exact") for memory in (shared, alone))
    )
    assert kl_report(model, guide, shared, x, num_samples=1).log_memory == pytest.approx(math.log(4))


def test_soft_attention():
    _, _, own, padded, x = setting()
    networks = WithoutNoise()
    model, guide = SoftAttentionModel(networks), SoftAttentionGuide(networks, target_guided=True)
    z = torch.randn(3, len(SIZES), 2)
    weights = model.attention(z, padded.encode(networks))
    classes = classify_by_attention(model, guide, padded, x, num_samples=1, num_classes=3)
    assert (weights[:, ~padded.mask] == 0).all()
    assert (classes.sum(1) - 1).abs().max() < 1e-5
    loss = MultiSampleELBO(2)(model, guide)(padded, x)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    bound = log_likelihood(model, guide, padded, x, num_samples=2)
    for b, memory in enumerate(own):
        alone = model.attention(z[:, b : b + 1], memory.encode(networks))[:, 0]
        torch.testing.assert_close(weights[:, b, padded.mask[b]], alone, atol=1e-5, rtol=1e-4)
        read = memory.encode(networks).read(alone.unsqueeze(1)).stem[:, 0]
        torch.testing.assert_close(padded.encode(networks).read(weights).stem[:, b], read, atol=1e-4, rtol=1e-4)
    assert bound.isfinite().all()


class TestOwnPrograms:
    def test_parts_that_know_nothing_of_masks(self):
        class Squared(nn.Module):
            def forward(self, query, keys):
                keys = keys - keys.mean(-2, keepdim=True)
                return -(query.unsqueeze(-2) - keys).square().sum(-1)

        class FirstPixels(nn.Module):
            def forward(self, memory):
                return memory.entries[..., 0, :3, :3].sum((-1, -2))

        model, guide, own, padded, x = setting()
        model, guide = (
            Model(model.networks, address_prior=FirstPixels()),
            Guide(model.networks, similarity=Squared()),
        )
        split = split_bound(model, guide, padded, x, num_samples=2)
        for b, memory in enumerate(own):
            alone = split_bound(model, guide, memory, x[b : b + 1])
            assert split.kl_address[b].item() == pytest.approx(alone.kl_address.item(), abs=1e-4)
            torch.testing.assert_close(split.address_probs[b, padded.mask[b]], alone.address_probs[0])

    def test_a_guide_of_ones_own_in_one_line(self):
        class Own(Guide):
            def forward(self, memory, x):
                memory = Memory.of(memory).encode(self.networks)
                query = self.networks.query(x)
                with pyro.plate("data", len(x), dim=-1):
                    logits = memory.masked(query.key.unsqueeze(1).mul(memory.features.key).sum(-1))
                    m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
                    pyro.sample("z", self.networks.posterior(query, m))

        model, _, own, padded, x = setting()
        found = address_posterior(Own(model.networks), padded, x)
        for b in range(len(own)):
            keys = model.networks.encode(own[b].entries).key
            expected = (keys @ model.networks.query(x[b : b + 1]).key[0]).softmax(0)
            torch.testing.assert_close(found[b], spread(expected, padded.mask[b]), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("which", ["model", "guide"])
    def test_a_program_that_forgets_the_mask_is_refused(self, which, monkeypatch):
        model, guide, _, padded, x = setting()
        forgetful = copy.copy(padded)
        calls = []

        def masked(self, logits):
            calls.append(logits)
            return logits if len(calls) == (1 if which == "guide" else 2) else Memory_masked(self, logits)

        Memory_masked = Memory.masked
        monkeypatch.setattr(Memory, "masked", masked)
        with pytest.raises(
            ValueError,
            match=r"^site 'address': expected no probability on padding \(memory.mask\), got up to .*; "
            r"give its distribution memory.masked\(logits\)",
        ):
            MultiSampleELBO(2)(model, guide)(forgetful, x)


class TestAMaskSurvives:
    def test_copies_slices_and_devices(self):
        *_, padded, x = setting()
        guide = Guide(WithoutNoise())
        wanted = address_posterior(guide, padded, x)
        twins = [copy.copy(padded), copy.deepcopy(padded), pickle.loads(pickle.dumps(padded)), padded.to("cpu")]
        twins += [padded.datapoints(slice(0, 4)), padded.encode(guide.networks)]
        twins += [Episode(padded, x, torch.zeros(4)).to("cpu").memory]
        for twin in twins:
            assert (twin.mask == padded.mask).all()
            assert (address_posterior(guide, twin, x) == wanted).all()
        part = padded.datapoints(slice(1, 3))
        assert part.num_entries.tolist() == [2, 4]

    def test_shares_of_processes(self):
        *_, padded, x = setting()
        share = take_share(Episode(padded, x, torch.zeros(4)), Ranks(rank=1, size=2))
        assert share.memory.num_entries.tolist() == [4, 6]


class TestPadded:
    def test_of_memories_of_different_sizes(self):
        *_, own, padded, _ = setting()
        found = Memory.padded(own)
        assert (found.mask == padded.mask).all()
        assert (found.entries == padded.entries).all()
        assert found.labels[0].tolist() == [0, -1, -1, -1, -1, -1]
        again = Memory.padded([Memory(found.entries[b], found.labels[b], mask=found.mask[b]) for b in range(4)])
        assert (again.entries == found.entries).all()
        assert (again.mask == found.mask).all()
        vectors = Memory.padded([Memory(torch.ones(2, 5), event_dim=1), Memory(torch.ones(3, 5), event_dim=1)])
        assert vectors.entries.shape == (2, 3, 5)
        assert vectors.labels is None

    @pytest.mark.parametrize(
        ("memories", "message"),
        [
            ([], "memories: expected at least one, got none"),
            (
                [torch.zeros(2, 3, 1, 28, 28)],
                r"memories\[0\]: expected one memory \[S, \*E\], got \[2, 3, 1, 28, 28\]",
            ),
            (
                [torch.zeros(2, 1, 28, 28), torch.zeros(2, 1, 8, 8)],
                r"memories\[1\]: expected entries of shape \[1, 28, 28\] as the first has, got \[1, 8, 8\]",
            ),
            (
                [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)],
                r"memories\[1\]: expected type torch.float32 as the first has, got torch.uint8",
            ),
            (
                [torch.zeros(2, 1, 8, 8), Memory(torch.zeros(2, 1, 8, 8), torch.arange(2))],
                r"memories\[1\]: expected labels: none as the first has, got torch.int64",
            ),
        ],
    )
    def test_refuses(self, memories, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Memory.padded(memories)


class TestErrors:
    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(2), "memory.mask: expected torch.bool, True for an entry, got torch.float32"),
            (
                torch.ones(3, dtype=torch.bool),
                r"memory.mask: expected shape \[2\], one value per entry, got \[3\]",
            ),
            (
                torch.zeros(2, dtype=torch.bool),
                "memory.mask: expected at least one entry in every memory, got none",
            ),
        ],
    )
    def test_of_a_shared_memory(self, mask, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            Memory(torch.zeros(2, 1, 8, 8), mask=mask)

    def test_an_empty_memory_is_named(self):
        mask = torch.tensor([[True, False], [False, False]])
        with pytest.raises(ValueError, match=r"^memory.mask: .*, got none in that of datapoint 1$"):
            Memory(torch.zeros(2, 2, 1, 8, 8), mask=mask)
        with pytest.raises(
            ValueError, match=r"^memory.mask: expected shape \[2, 2\], one value per entry, got \[2\]"
        ):
            Memory(torch.zeros(2, 2, 1, 8, 8), mask=mask[0])

    def test_nan_among_the_entries_is_refused_still(self):
        entries = torch.full((2, 1, 8, 8), math.nan)
        with pytest.raises(ValueError, match="^memory.entries: expected finite values"):
            Memory(entries, mask=torch.tensor([True, False]))

    def test_where_there_is_no_mask(self):
        model, guide, own, padded, _ = setting()
        shared = Memory(own[3].entries, mask=torch.arange(S) < 3)
        with pytest.raises(
            ValueError, match="^bank: expected every row to be an entry, got a memory with padding"
        ):
            SelectedMemory(shared, torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="^entries: expected a tensor of images .*, got a Memory"):
            AddressIndex.encode(model, guide, shared)


@pytest.mark.parametrize(
    ("lead", "labels"), [((3,), [0, 1, -1]), ((2, 3), [[0, 1, 0], [0, -7, 1]])], ids=["shared", "own"]
)
def test_labels_below_zero_are_padding_that_lacks_its_mask(lead, labels, random_images):
    """Else its entries would be addressed like any others, and be in the mean of the keys."""
    entries, labels = random_images(*lead), torch.tensor(labels)
    with pytest.raises(
        ValueError, match="^memory.labels: expected 0 or more for every entry, got -[17]; [^\n]*mask"
    ):
        Memory(entries, labels)
    Memory(entries, labels, mask=labels >= 0)
