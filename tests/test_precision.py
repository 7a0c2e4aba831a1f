"""Arithmetic in bfloat16: what stays in 32 bits, what it is chosen by, and that a run is the same run."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vma_pyro import ConvNetworks, Guide, Memory, MLPNetworks, Model
from vma_pyro._system import processor
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import make
from vma_pyro.networks.layers import ConvTranspose2d
from vma_pyro.training import TrainConfig, fit
from vma_pyro.training.captured import Captured
from vma_pyro.training.config import identity_of, precision_of
from vma_pyro.training.loss import Loss, bf16

CPU = torch.device("cpu")
K, B, S = 3, 5, 7


def convolutional():
    return ConvNetworks(4, width=0.1, key_dim=6, hidden_dim=9)


def perceptrons():
    return MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)


def pair(make_networks, seed=0):
    torch.manual_seed(seed)
    networks = make_networks()
    return Model(networks), Guide(networks)


@pytest.mark.parametrize(("has", "found"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_what_the_processor_is_faster_in(monkeypatch, has, found):
    monkeypatch.setattr("vma_pyro.training.config.is_faster_in_bf16", lambda device: has)
    config = TrainConfig(accelerator="cpu")
    assert precision_of(config) == found
    assert identity_of(config)["precision"] == found
    assert precision_of(replace(config, precision="32-true")) == "32-true"
    assert precision_of(replace(config, precision="bf16-mixed")) == "bf16-mixed"


@pytest.mark.parametrize(
    ("avx", "amx", "intel", "layers", "matrices"),
    [
        (False, False, False, False, False),
        (True, False, False, True, False),  # AMD since Zen 4
        (True, False, True, False, False),  # Intel, whose AMX a virtual machine hides
        (True, True, True, True, True),
        (False, True, True, True, True),
    ],
)
def test_bfloat16_is_faster_where_the_processor_multiplies_at_full_rate(
    avx, amx, intel, layers, matrices, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(processor, "_is_intels", lambda: intel)
    assert processor.is_faster_in_bf16(CPU) == layers
    assert processor.multiplies_matrices_in_bf16(CPU) == matrices


def test_a_device_of_which_nothing_is_known_is_not_faster_in_bfloat16():
    assert not processor.is_faster_in_bf16(torch.device("mps"))


@pytest.mark.parametrize("make_networks", [convolutional, perceptrons])
def test_what_probabilities_are_made_of_stays_in_32_bits(make_networks, random_images):
    networks = pair(make_networks)[0].networks
    with bf16(CPU):
        features, query = networks.encode(random_images(S)), networks.query(random_images(B))
        heads = networks.heads(features)
        z = torch.randn(S, 4)
        logits = networks.decode(z, heads)
        prior = networks.prior(heads)
    assert features.top.dtype == torch.bfloat16
    assert {t.dtype for t in (features.key, query.key, logits, prior.mean)} == {torch.float32}
    # Not only by name: keys have digits that bfloat16 has not.
    assert not torch.equal(features.key, features.key.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "make_networks"),
    [
        ("vimco", perceptrons),
        ("vimco+dreg+resampled", convolutional),
        ("loo", perceptrons),
        ("distinct", convolutional),
    ],
)
def test_replays_are_bit_for_bit_in_bf16(name, make_networks, random_images):
    memory, images = Memory(random_images(S)), [random_images(B) for _ in range(3)]
    gradients = []
    for kind in (lambda fn: Captured(fn, wait=0, autocast=lambda: bf16(CPU), note=pytest.fail), in_python):
        loss_fn = make(name, K)(*pair(make_networks))
        loss = kind(loss_fn)
        torch.manual_seed(1)
        for x in images:
            loss.gradient(memory, x)
        gradients.append([p.grad for p in loss_fn.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def in_python(loss_fn):
    return Loss(loss_fn, autocast=lambda: bf16(CPU))


def test_the_gradient_of_a_layer_used_twice_is_summed_in_32_bits(random_images):
    """The pyramid climbs from images and from entries; two gradients in bfloat16 would be added in it."""
    model, guide = pair(convolutional)
    loss_fn = make("vimco", K)(model, guide)
    Loss(loss_fn, autocast=lambda: bf16(CPU)).gradient(Memory(random_images(S)), random_images(B))
    gradient = model.networks.pyramid[0].weight.grad
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("optimizer", ["muon", "adam", "soap"])
@pytest.mark.parametrize("make_networks", [convolutional, perceptrons])
def test_a_resumed_run_in_bf16_is_the_uninterrupted_one(optimizer, make_networks, tmp_path):
    characters = glyphs.load(classes=12, examples=6)
    config = TrainConfig(
        updates=9, log_every=2, validate_every=4, warmup_updates=3, optimizer=optimizer, precision="bf16-mixed",
        validation_samples=2, accelerator="cpu",
    )  # fmt: skip

    def train(folder, config, *, resume=False):
        model, guide = pair(make_networks)
        sampler = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
        held_out = [EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=1).sample()]
        elbo = make("vimco+dreg+resampled", K)
        fit(model, guide, elbo, sampler, config=config, folder=folder, validation=held_out, resume=resume)
        lines = read_metrics(folder / "metrics.jsonl")
        figures = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
        return figures, list(model.parameters()) + list(guide.parameters())

    whole, weights = train(tmp_path / "whole", config)
    for session in range(9):
        parts, resumed = train(tmp_path / "parts", replace(config, session_minutes=1e-9), resume=session > 0)
    parts, resumed = train(tmp_path / "parts", config, resume=True)
    assert parts == whole
    for ours, theirs in zip(resumed, weights, strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_is_not_resumed_in_another_precision(tmp_path):
    characters = glyphs.load(classes=12, examples=6)
    config = TrainConfig(updates=2, accelerator="cpu", precision="bf16-mixed")
    for precision, resume in (("bf16-mixed", False), ("32-true", True)):
        model, guide = pair(perceptrons)
        sampler = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
        chosen = replace(config, precision=precision)
        if not resume:
            fit(model, guide, make("vimco", K), sampler, config=chosen, folder=tmp_path)
            continue
        with pytest.raises(ValueError, match=r"resume: expected precision = 'bf16-mixed' .* got '32-true'"):
            fit(model, guide, make("vimco", K), sampler, config=chosen, folder=tmp_path, resume=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_transposed_convolution_is_torchs(dtype, with_bias):
    torch.manual_seed(0)
    ours = ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=with_bias).to(dtype)
    theirs = nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=with_bias).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 7, dtype=dtype)
    weight = torch.randn(2, 5, 12, 14, dtype=dtype)
    for layer in (ours, theirs):
        (torch.relu_(layer(x)) * weight).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-12)
    if dtype == torch.float64:
        x.requires_grad_(True)
        assert torch.autograd.gradcheck(ours, (x,))
        assert torch.autograd.gradgradcheck(ours, (x,))
