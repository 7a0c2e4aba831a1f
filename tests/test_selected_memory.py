"""Memories selected from a bank: the figures of memories of their own, with each entry encoded once."""

import copy

import pytest
import torch

from vma_pyro import ConvNetworks, Guide, Memory, MLPNetworks, Model
from vma_pyro.comparisons import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import Episode
from vma_pyro.evaluation import (
    address_posterior,
    classify,
    classify_by_attention,
    classify_by_likelihood,
    encoded,
    kl_report,
    log_likelihood,
)
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.memory import BankMemory, KeyedBank, SelectedMemory
from vma_pyro.retrieval import RetrievalGuide

NETWORKS = {
    "conv": lambda: ConvNetworks(3, width=0.1),
    "conv, copies": lambda: ConvNetworks(3, width=0.1, copies=True),
    "mlp": lambda: MLPNetworks(3, hidden_dims=(8, 7), key_dim=5, copies=True),
}


def setting(kind, *, batch=5, size=6, bank=23):
    torch.manual_seed(1)
    images = (torch.rand(bank, 1, 28, 28) < 0.3).float()
    rows = torch.stack([torch.randperm(bank)[:size] for _ in range(batch)])
    labels = torch.arange(3).repeat_interleave(2).expand(batch, -1)
    x = (torch.rand(batch, 1, 28, 28) < 0.3).float()
    networks = NETWORKS[kind]()
    return networks, SelectedMemory(Memory(images), rows, labels), Memory(images[rows], labels), x


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_same_figures_as_memories_of_their_own(kind):
    networks, selected, own, x = setting(kind)
    model, guide = Model(networks), Guide(networks)
    for address, samples in (("sampled", 7), ("exact", 3)):
        options = {"num_samples": samples, "address": address}
        torch.testing.assert_close(
            log_likelihood(model, guide, selected, x, **options),
            log_likelihood(model, guide, own, x, **options),
            rtol=1e-5,
            atol=1e-4,
        )
    torch.testing.assert_close(classify(guide, selected, x), classify(guide, own, x))
    torch.testing.assert_close(
        *(classify_by_likelihood(model, guide, m, x, num_samples=4) for m in (selected, own)), rtol=1e-4, atol=1e-4
    )
    ours, theirs = (
        kl_report(model, guide, m, x, labels=torch.zeros(5, dtype=torch.long)) for m in (selected, own)
    )
    assert ours.kl_address.mean == pytest.approx(theirs.kl_address.mean, rel=1e-4)
    assert ours.kl_z.mean == pytest.approx(theirs.kl_z.mean, rel=1e-4)


def test_a_soft_read():
    networks, selected, own, x = setting("conv")
    model, guide = SoftAttentionModel(networks), SoftAttentionGuide(networks, target_guided=True)
    for function in (log_likelihood, classify_by_attention):
        found = [function(model, guide, memory, x, num_samples=4) for memory in (selected, own)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def counting(monkeypatch):
    """Numbers of entries that are encoded, call by call."""
    encode, seen = ConvNetworks.encode, []
    monkeypatch.setattr(
        ConvNetworks, "encode", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    return seen


def test_each_entry_selected_is_encoded_once_in_an_evaluation(monkeypatch):
    networks, selected, _, x = setting("conv")
    model, guide, seen = Model(networks), Guide(networks), counting(monkeypatch)
    for samples in (3, 5):
        seen.clear()
        log_likelihood(model, guide, selected, x, num_samples=samples)
        assert seen == [23]  # the bank is smaller than what is selected from it
    seen.clear()
    few = selected.datapoints(slice(2))
    log_likelihood(model, guide, few, x[:2], num_samples=3)
    assert seen == [len(few.rows.unique())]


def test_a_pass_over_episodes_encodes_their_bank_once(monkeypatch):
    networks, selected, _, x = setting("conv")
    model, guide, seen = Model(networks), Guide(networks), counting(monkeypatch)
    labels = torch.zeros(1, dtype=torch.long)
    parts = [Episode(selected.datapoints(slice(b, b + 1)), x[b : b + 1], labels) for b in range(5)]
    plain = [log_likelihood(model, guide, e.memory, e.x, num_samples=3) for e in parts]
    for change in (0.0, 0.1):  # a second pass sees the parameters as they are then
        with torch.no_grad():
            for parameter in networks.parameters():
                parameter.mul_(1 + change)
        seen.clear()
        found = [log_likelihood(model, guide, e.memory, e.x, num_samples=3) for e in encoded(guide, parts)]
        assert seen == [23]
        if not change:
            torch.testing.assert_close(torch.cat(found), torch.cat(plain), rtol=1e-5, atol=1e-4)
        else:
            assert not torch.allclose(torch.cat(found), torch.cat(plain))
    other = Guide(ConvNetworks(3, width=0.1))
    for e, before in zip(encoded(guide, parts), parts, strict=True):  # others encode for themselves
        assert torch.equal(classify(other, e.memory, e.x), classify(other, before.memory, before.x))


def test_gradients_are_those_of_memories_of_their_own():
    networks, selected, own, x = setting("mlp")
    loss_fn = MultiSampleELBO(3)(Model(networks), Guide(networks))
    found = []
    for memory in (selected, own):
        loss_fn.zero_grad()
        torch.manual_seed(0)
        loss_fn(memory, x).backward()
        found.append([p.grad.clone() for p in loss_fn.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_in_chunks(monkeypatch):
    networks, selected, own, x = setting("mlp")
    monkeypatch.setattr("vma_pyro.memory.encoded.ENTRIES_PER_CHUNK", 4)
    torch.testing.assert_close(classify(Guide(networks), selected, x), classify(Guide(networks), own, x))


@pytest.mark.parametrize("rows", [[[0, 23]], [[-1, 2]]])
def test_rows_outside_of_the_bank_are_refused(rows):
    images = torch.zeros(23, 1, 28, 28)
    with pytest.raises(ValueError, match=r"^rows: expected 0 to 22, entries of the bank, got "):
        SelectedMemory(Memory(images), torch.tensor(rows))


def test_an_encoder_of_plain_tensors():
    class Plain(torch.nn.Module):
        def encode(self, entries):
            return entries.flatten(1)

    _, selected, own, _ = setting("mlp")
    plain, address = Plain(), torch.tensor([0, 5, 2, 2, 1])
    assert torch.equal(selected.encode(plain).features, own.encode(plain).features)
    assert torch.equal(selected.encode(plain).read(address), own.encode(plain).read(address))
    assert torch.equal(selected.read(address), own.read(address))


def test_parts_and_copies():
    _, selected, own, _ = setting("mlp")
    part = selected.datapoints(slice(1, 3))
    assert isinstance(part, SelectedMemory)
    assert torch.equal(part.entries, own.entries[1:3])
    assert torch.equal(part.labels, own.labels[1:3])
    assert part.bank is selected.bank
    assert selected.to("cpu") is selected
    assert torch.equal(copy.copy(selected).entries, own.entries)
    assert (selected.size, selected.batch_size, selected.is_shared) == (6, 5, False)
    moved = selected.to("meta")
    assert isinstance(moved, SelectedMemory)
    assert moved.rows.device.type == "meta"


def test_a_bank_is_one_memory():
    images = torch.zeros(2, 3, 1, 28, 28)
    with pytest.raises(ValueError, match=r"^bank: expected one shared memory, got entries \[2, 3, 1, 28, 28\]$"):
        SelectedMemory(Memory(images), torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("prepared", ["with candidates", "with none", "by `encoded`"])
def test_a_bank_of_which_few_are_encoded_is_read_as_a_whole_one(prepared):
    """Its table is of candidates: rows of the bank are not rows of it."""
    networks, selected, own, x = setting("mlp")
    guide = RetrievalGuide(networks, candidates=6, least=2)
    memory = BankMemory(KeyedBank(selected.bank.entries))
    with torch.no_grad():
        if prepared == "with candidates":
            memory = guide.prepare(memory, x).args[0]
        elif prepared == "with none":
            memory = memory.encode(networks)
        of_bank = SelectedMemory(memory, selected.rows, selected.labels)
        if prepared == "by `encoded`":
            (episode,) = encoded(guide, [Episode(of_bank, x, None)])
            of_bank = episode.memory
        found = address_posterior(Guide(networks), of_bank, x)
        expected = address_posterior(Guide(networks), own, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [torch.ones(3, 4), [[0, 1]]])
def test_rows_of_another_type_are_refused(rows):
    with pytest.raises(ValueError, match="^rows: expected int64, got (torch.float32|list)$"):
        SelectedMemory(setting("mlp")[1].bank, rows)
