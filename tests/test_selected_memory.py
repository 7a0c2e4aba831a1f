"""Memories selected from a bank: the figures of memories of their own, with each entry encoded once."""

import copy

import pytest
import torch

from vma_pyro import ConvNetworks, Guide, Memory, MLPNetworks, Model
from vma_pyro.comparisons import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.evaluation import (
    classify,
    classify_by_attention,
    classify_by_likelihood,
    kl_report,
    log_likelihood,
)
from vma_pyro.memory.selected import SelectedMemory, bank_of

NETWORKS = {
    "conv": lambda: ConvNetworks(3, width=0.1),
    "mlp": lambda: MLPNetworks(3, hidden_dims=(8, 7), key_dim=5, copies=True),
}


def setting(kind, *, batch=5, size=6, bank=23):
    torch.manual_seed(1)
    images = (torch.rand(bank, 1, 28, 28) < 0.3).float()
    rows = torch.stack([torch.randperm(bank)[:size] for _ in range(batch)])
    labels = torch.arange(3).repeat_interleave(2).expand(batch, -1)
    x = (torch.rand(batch, 1, 28, 28) < 0.3).float()
    networks = NETWORKS[kind]()
    return networks, SelectedMemory(bank_of(images), rows, labels), Memory(images[rows], labels), x


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


def test_each_entry_of_the_bank_is_encoded_once_for_the_same_networks(monkeypatch):
    networks, selected, _, x = setting("conv")
    model, guide = Model(networks), Guide(networks)
    encode, seen = ConvNetworks.encode, []
    monkeypatch.setattr(
        ConvNetworks, "encode", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    for samples in (3, 5):
        log_likelihood(model, guide, selected, x, num_samples=samples)
    assert seen == [23]
    other = Guide(ConvNetworks(3, width=0.1))
    assert not torch.equal(classify(other, selected, x), classify(guide, selected, x))
    assert seen == [23, 23, 23]  # a bank remembers the last networks


def test_in_chunks(monkeypatch):
    networks, selected, own, x = setting("mlp")
    monkeypatch.setattr("vma_pyro.memory.selected.ENTRIES_PER_CHUNK", 4)
    torch.testing.assert_close(classify(Guide(networks), selected, x), classify(Guide(networks), own, x))


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
