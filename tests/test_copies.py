"""Decoders that are given the entry's pixels themselves: who wants them, and what they start from."""

import pytest
import torch

from vma_pyro import (
    BernoulliPixels,
    ContinuousBernoulli,
    ConvNetworks,
    DiscretizedLogistics,
    Guide,
    Memory,
    Model,
    models,
)
from vma_pyro.comparisons import MemorylessModel, SoftAttentionModel
from vma_pyro.evaluation import log_likelihood
from vma_pyro.likelihoods import CausalLogistics

S, B, Z = 5, 3, 4


def made(image_shape=(1, 8, 8), **options):
    return ConvNetworks(Z, image_shape=image_shape, width=0.1, key_dim=4, hidden_dim=8, **options)


def levels(*shape):
    return torch.randint(256, shape).float() / 255


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 9, 14), (3, 32, 32)])
def test_the_mean_starts_at_the_pixels_of_the_entry_that_is_read(image_shape):
    networks = made(image_shape)
    Model(networks, likelihood=DiscretizedLogistics(2))
    entries = levels(S, *image_shape)
    memory = Memory(entries).encode(networks)
    for address in (torch.randint(S, (2, B)), torch.arange(S)[:, None]):  # drawn, and enumerated
        decoded = networks.decode(
            torch.randn(2, B, Z) if address.shape == (2, B) else torch.randn(B, Z), memory.read(address)
        )
        mean = decoded[..., : image_shape[0], :, :].sigmoid()
        expected = entries[address].expand_as(mean)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1 / 512 + 1e-6)


def test_who_copies():
    def copies(likelihood, kind=Model, **options):
        networks = made(**options)
        kind(networks, likelihood=likelihood)
        assert hasattr(networks, "skip0") == networks.copies
        return networks.copies

    assert copies(DiscretizedLogistics(2))
    assert copies(CausalLogistics(2))
    assert copies(DiscretizedLogistics(2), SoftAttentionModel)
    assert not copies(DiscretizedLogistics(2), MemorylessModel)  # which reads nothing
    assert not copies(BernoulliPixels())
    assert not copies(ContinuousBernoulli())
    # What the constructor was told stands.
    assert not copies(DiscretizedLogistics(2), copies=False)
    assert copies(BernoulliPixels(), copies=True)
    assert copies(None, MemorylessModel, copies=True)


def test_it_starts_alike_whoever_decides():
    """Layers that a ReLU follows keep its factor, in a constructor and when the likelihood decides."""
    decided = ConvNetworks(Z, image_shape=(3, 8, 8))
    Model(decided, likelihood=DiscretizedLogistics(2))
    for networks in (decided, ConvNetworks(Z, image_shape=(3, 8, 8), copies=True)):
        weight = networks.skip0.weight
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.1)
        assert networks.to_logits.weight.abs().max() == 0


def test_a_model_that_copies_is_saved_loaded_and_trained_on(tmp_path):
    networks = made((3, 8, 9))
    pair = Model(networks, likelihood=CausalLogistics(2, colours=3)), Guide(networks)
    memory, x = Memory(levels(S, 3, 8, 9)), levels(B, 3, 8, 9)
    torch.manual_seed(1)
    with torch.no_grad():
        networks.log_copy.fill_(-0.3)
        for layer in (networks.to_logits, networks.to_maps):
            layer.weight.normal_(0.0, 0.1)
    models.save(tmp_path / "model.pt", pair)
    again = models.load(tmp_path / "model.pt")
    assert again[0].networks.copies
    nll = [log_likelihood(*both, memory, x, num_samples=2, seed=0) for both in (pair, again)]
    torch.testing.assert_close(*nll, rtol=0, atol=0)


def test_every_weight_that_copies_learns():
    networks = made((3, 8, 8))
    model = Model(networks, likelihood=DiscretizedLogistics(2))
    with torch.no_grad():  # past the start, where zeros hide what lies before them
        networks.to_logits.weight.normal_()
    entries = levels(S, 3, 8, 8)
    decoded = networks.decode(torch.randn(B, Z), Memory(entries).encode(networks).read(torch.zeros(B).long()))
    model.likelihood(decoded).log_prob(levels(B, 3, 8, 8)).sum().backward()
    for parameter in (networks.skip0.weight, networks.log_copy, networks.to_logits.weight):
        assert parameter.grad.abs().max() > 0
