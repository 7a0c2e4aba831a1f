"""Muon: orthogonalised steps for the weights of layers, Adam's for the rest."""

import copy
import math

import pytest
import torch
from torch import nn

from vma_pyro import ConvNetworks, Guide, Model
from vma_pyro.training.muon import Muon, orthogonalised
from vma_pyro.training.optimizers import make_optimizer

RATE = 0.01


class Layers(nn.Module):
    """A layer of every kind, and a parameter of no layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.conv = nn.Conv2d(2, 4, 3)
        self.transposed = nn.ConvTranspose2d(4, 2, 3)
        self.memory = nn.Parameter(torch.randn(7, 6))


def with_gradients(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def begin_with(optimizer, *, progress):
    for group in optimizer.param_groups:
        group["progress"] = progress


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Layers().double()


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_are_nearly_one_and_directions_are_kept(shape, dtype):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1.0, 3.0, min(shape), dtype=torch.float64)) @ v
    found = u.T @ orthogonalised(matrix.to(dtype)).double() @ v.T
    inside = found.diagonal()
    digits = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert inside.min() > 0.65
    assert inside.max() < 1.25
    assert (found - torch.diag(inside)).abs().max() < digits


def test_two_steps_are_those_of_the_formula(layers):
    by_hand = copy.deepcopy(layers)
    optimizer = Muon(layers, RATE, momentum=0.9, dtype=torch.float64)
    momentum = {}
    for seed in range(2):
        with_gradients(layers, seed)
        optimizer.step()
        with_gradients(by_hand, seed)
        for name, p in by_hand.named_parameters():
            if not name.endswith("weight"):
                continue
            momentum[name] = 0.9 * momentum.get(name, 0) + p.grad
            g = p.grad + 0.9 * momentum[name]
            # Maps out by (maps in times taps), which a transposed convolution keeps the other way round.
            matrix = (g.transpose(0, 1) if name == "transposed.weight" else g).flatten(1)
            step = 0.2 * RATE * math.sqrt(max(matrix.shape)) * orthogonalised(matrix)
            if name == "transposed.weight":
                step = step.view(2, 4, 3, 3).transpose(0, 1)
            p.data -= step.reshape(p.shape)
    for name, p in by_hand.named_parameters():
        if name.endswith("weight"):
            assert torch.allclose(layers.get_parameter(name), p, atol=1e-12), name


def test_what_is_no_weight_of_a_layer_moves_as_under_adam(layers):
    by_adam = copy.deepcopy(layers)
    ours, theirs = Muon(layers, RATE), torch.optim.Adam(by_adam.parameters(), RATE, fused=True)
    for seed in range(3):
        for module, optimizer in ((layers, ours), (by_adam, theirs)):
            with_gradients(module, seed)
            optimizer.step()
    for name in ("memory", "linear.bias", "conv.bias", "transposed.bias"):
        assert torch.equal(layers.get_parameter(name), by_adam.get_parameter(name)), name


def test_a_transposed_convolution_moves_as_the_convolution_it_transposes():
    torch.manual_seed(0)
    transposed, plain = nn.ConvTranspose2d(4, 2, 3, bias=False), nn.Conv2d(4, 2, 3, bias=False)
    plain.weight.data = transposed.weight.data.transpose(0, 1).clone()
    transposed.weight.grad = torch.randn(4, 2, 3, 3)
    plain.weight.grad = transposed.weight.grad.transpose(0, 1).clone()
    for layer in (transposed, plain):
        Muon(layer, RATE).step()
    assert torch.allclose(transposed.weight.transpose(0, 1), plain.weight, atol=1e-7)


def test_frozen_parameters_and_those_without_a_gradient_stay(layers):
    layers.linear.requires_grad_(False)
    with_gradients(layers)
    layers.conv.weight.grad = None
    before = copy.deepcopy(layers.state_dict())
    Muon(layers, RATE).step()
    moved = {name for name, value in layers.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"conv.bias", "transposed.weight", "transposed.bias", "memory"}


def test_a_weight_that_two_layers_share_moves_once():
    torch.manual_seed(0)
    pair, alone = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.Linear(3, 3)
    pair[1].weight = pair[0].weight
    alone.load_state_dict(pair[0].state_dict())
    pair[0].weight.grad = torch.ones(3, 3)
    alone.weight.grad = torch.ones(3, 3)
    Muon(pair, RATE).step()
    Muon(alone, RATE).step()
    assert torch.equal(pair[0].weight, alone.weight)


def test_its_state_goes_on_where_it_was(layers):
    optimizer = Muon(layers, RATE)
    with_gradients(layers, 0)
    optimizer.step()
    other = copy.deepcopy(layers)
    resumed = Muon(other, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, o in ((layers, optimizer), (other, resumed)):
        with_gradients(module, 1)
        o.step()
    for p, q in zip(layers.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bf16", [False, True])
def test_channels_last_weights_move_like_others(bf16):
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, hidden_dim=9)
    default = copy.deepcopy(networks).to(memory_format=torch.contiguous_format)
    for module in (networks, default):
        optimizer = make_optimizer("muon", module, RATE, bf16=bf16)
        begin_with(optimizer, progress=0.5)
        with_gradients(module)
        optimizer.step()
    for p, q in zip(networks.parameters(), default.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-3 * RATE if not bf16 else 0.1 * RATE)


def test_model_and_guide_that_share_networks_have_each_weight_once():
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, hidden_dim=9)
    both = nn.ModuleList([Model(networks), Guide(networks)])
    matrices = sum(len(g["params"]) for g in Muon(both, RATE).param_groups if "momentum" in g)
    assert matrices == sum(isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) for m in networks.modules())


def test_a_weight_computed_of_other_parameters_is_adams():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    by_adam = copy.deepcopy(layer)
    for module, optimizer in ((layer, Muon(layer, RATE)), (by_adam, torch.optim.Adam(by_adam.parameters(), RATE))):
        with_gradients(module)
        optimizer.step()
    for p, q in zip(layer.parameters(), by_adam.parameters(), strict=True):
        assert torch.allclose(p, q)


def test_the_first_part_is_adams_at_its_own_rate(layers):
    by_adam = copy.deepcopy(layers)
    ours, theirs = Muon(layers, RATE, adam_first=0.3), torch.optim.Adam(by_adam.parameters(), 0.375 * RATE)
    for seed, progress in enumerate((0.0, 0.2, 0.29)):
        begin_with(ours, progress=progress)
        for module, optimizer in ((layers, ours), (by_adam, theirs)):
            with_gradients(module, seed)
            optimizer.step()
    for p, q in zip(layers.parameters(), by_adam.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


@pytest.mark.parametrize("mean_of", [0.9, 0.7])
def test_muon_takes_over_with_adams_sum_of_the_gradients(layers, mean_of):
    optimizer = Muon(layers, RATE, momentum=0.8, betas=(mean_of, 0.999), adam_first=0.5, dtype=torch.float64)
    gradients = []
    for seed, progress in enumerate((0.1, 0.4, 0.5)):
        begin_with(optimizer, progress=progress)
        gradients.append(with_gradients(layers, seed).linear.weight.grad.clone())
        before = layers.linear.weight.detach().clone()
        optimizer.step()
    total = 0.8 * (mean_of * gradients[0] + gradients[1]) + gradients[2]
    step = 0.2 * RATE * math.sqrt(5) * orthogonalised(gradients[2] + 0.8 * total)
    assert torch.allclose(layers.linear.weight, before - step, atol=1e-12)
    assert set(optimizer.state[layers.linear.weight]) == {"momentum"}
    assert "exp_avg" in optimizer.state[layers.memory]


def test_a_longer_budget_does_not_give_a_run_back_to_adam(layers):
    other = copy.deepcopy(layers)
    ours, theirs = (Muon(module, RATE, adam_first=0.5) for module in (layers, other))
    for seed, (progress, always) in enumerate(((0.4, 0.4), (0.6, 0.6), (0.3, 0.6))):
        begin_with(ours, progress=progress)
        begin_with(theirs, progress=always)
        for module, optimizer in ((layers, ours), (other, theirs)):
            with_gradients(module, seed)
            optimizer.step()
    for p, q in zip(layers.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_first_part_that_is_no_part_is_refused(layers, share):
    with pytest.raises(ValueError, match=r"adam_first: expected a share in \[0, 1\), got"):
        Muon(layers, RATE, adam_first=share)


def test_a_first_part_without_progress_is_refused(layers):
    with_gradients(layers)
    with pytest.raises(ValueError, match="progress: expected in every group with adam_first=0.2, found none"):
        Muon(layers, RATE, adam_first=0.2).step()


@pytest.mark.parametrize("progress", [0.1, 0.6])
def test_the_state_of_both_parts_goes_on_where_it_was(layers, progress):
    optimizer = Muon(layers, RATE, adam_first=0.5)
    for seed in range(2):
        begin_with(optimizer, progress=0.4 + seed * (progress - 0.4))
        with_gradients(layers, seed)
        optimizer.step()
    other = copy.deepcopy(layers)
    resumed = Muon(other, RATE, adam_first=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, o in ((layers, optimizer), (other, resumed)):
        begin_with(o, progress=0.7)
        with_gradients(module, 3)
        o.step()
    for p, q in zip(layers.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_nothing_beside_the_rest_is_left_out(dtype):
    """Momentum of dead units: as small as floats can be, and so slow to multiply; not a part of the step."""
    torch.manual_seed(0)
    matrix = torch.randn(30, 40)
    dead = matrix.clone()
    dead[5:9] *= 1e-39
    dead[:, 7:11] *= 1e-30
    gone = matrix.clone()
    gone[5:9], gone[:, 7:11] = 0, 0
    assert torch.equal(orthogonalised(dead.to(dtype)), orthogonalised(gone.to(dtype)))
    small = orthogonalised((1e-6 * matrix).to(dtype)).float()  # a small gradient is no small step
    assert torch.allclose(
        small, orthogonalised(matrix.to(dtype)).float(), atol=1e-4 if dtype == torch.float32 else 0.05
    )


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e25), (torch.bfloat16, 1e25), (torch.float32, 1e37), (torch.float64, 1e300)],
)
def test_no_gradient_is_too_long_to_be_orthogonalised(dtype, factor):
    torch.manual_seed(0)
    matrix = torch.randn(3, 8, dtype=dtype)
    long, short = orthogonalised(factor * matrix), orthogonalised(matrix)
    assert torch.allclose(long.double(), short.double(), atol=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_long_gradient_in_64_bits_is_a_step():
    steps = []
    for factor in (1.0, 1e60):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3, bias=False).double()
        before = layer.weight.detach().clone()
        muon = Muon(layer, 0.1)
        (factor * layer(torch.ones(2, 5, dtype=torch.float64)).square().sum()).backward()
        muon.step()
        steps.append(layer.weight.detach() - before)
    assert steps[0].abs().max() > 1e-3
    torch.testing.assert_close(*steps, rtol=0.02, atol=1e-4)


def test_a_layer_without_outputs_is_no_obstacle():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight = nn.Parameter(torch.empty(0, 3))
    muon = Muon(layer, 0.1)
    layer(torch.ones(2, 3)).sum().backward()
    muon.step()
