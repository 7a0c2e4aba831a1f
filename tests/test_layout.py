"""Parameters, gradients and the state of optimizers that lie otherwise in memory than usual."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training.captured import Captured
from vma_pyro.training.layout import lay_state, lies_alike
from vma_pyro.training.loss import Loss
from vma_pyro.training.muon import Muon
from vma_pyro.training.optimizers import OPTIMIZERS, make_optimizer

KINDS = {
    "transposed": lambda a, b: a.t() + b,  # a gradient in another order than its parameter
    "two parts of a sum": lambda a, b: a + b,  # one tensor for both
    "summed": lambda a, b: a.sum() + b,  # one number, repeated
    "a row": lambda a, b: a[0] + b.flip(0),
    "permuted": lambda a, b: a.view(4, 7, 28).permute(2, 1, 0).reshape(28, 28) + b,
}


class Shifted(Model):
    """With two parameters that move the logits."""

    def __init__(self, networks, kind):
        super().__init__(networks)
        self.kind = kind
        self.a, self.b = (nn.Parameter(torch.zeros(28, 28)) for _ in range(2))

    def likelihood(self, logits):
        return super().likelihood(logits + KINDS[self.kind](self.a, self.b))


def after_updates(kind, name, make_loss, clip, random_images):
    torch.manual_seed(0)
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    loss_fn = MultiSampleELBO(3, max_plate_nesting=1)(Shifted(networks, kind), Guide(networks))
    loss, optimizer = make_loss(loss_fn), make_optimizer(name, loss_fn, 0.01)
    for group in optimizer.param_groups:
        group["progress"] = 0.5
    memory, x = Memory(random_images(7)), random_images(5)
    torch.manual_seed(1)
    for _ in range(4):
        loss.gradient(memory, x)
        nn.utils.clip_grad_norm_(loss_fn.parameters(), clip)
        optimizer.step()
    return list(loss_fn.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "clip", "wait"), [("muon", 1.0, 0), ("adam", 1.0, 99), ("adam", 1e9, 99), ("muon", 1e9, 99)]
)
def test_updates_are_those_of_a_backward_pass(kind, name, clip, wait, random_images):
    streams = torch.rand(7, 1, 28, 28), torch.rand(5, 1, 28, 28)

    def images(number):
        return (streams[number == 5] < 0.3).float()

    ours = after_updates(kind, name, lambda f: Captured(f, wait=wait), clip, images)
    theirs = after_updates(kind, name, Loss, clip, images)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def odd_parameters():
    return {
        "gaps": torch.zeros(6, 14)[:, ::2],
        "repetitions": torch.zeros(1).expand(5),
        "overlap": torch.zeros(9).as_strided((4, 3), (2, 1)),
    }


@pytest.mark.parametrize("kind", odd_parameters())
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gaps_and_repetitions_in_a_parameter_are_refused(kind, name):
    module = nn.Module()
    module.odd = nn.Parameter(odd_parameters()[kind])
    with pytest.raises(
        ValueError, match="odd: expected a parameter without gaps or repetitions in memory, got shape"
    ):
        make_optimizer(name, module, 0.01)
    module.odd.requires_grad_(False)
    module.even = nn.Parameter(torch.zeros(3, 1, 2).permute(2, 1, 0))
    make_optimizer(name, module, 0.01)


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="weight: expected a parameter of real numbers, got torch.complex64"):
        Muon(nn.Linear(3, 2, dtype=torch.complex64), 0.01)


def conv(memory_format):
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3).to(memory_format=memory_format)


@pytest.mark.parametrize("name", ["adam", "muon"])
@pytest.mark.parametrize("progress", [0.1, 0.6])
def test_a_state_of_another_layout_is_gone_on_with(name, progress):
    before, after = conv(torch.channels_last), conv(torch.contiguous_format)
    one, other = (make_optimizer(name, module, 0.01) for module in (before, after))
    for step in range(3):
        if step == 1:
            after.load_state_dict(before.state_dict())
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            lay_state(other)
        for module, optimizer in ((before, one), (after, other)):
            for group in optimizer.param_groups:
                group["progress"] = progress
            generator = torch.Generator().manual_seed(step)
            for p in module.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
    assert not lies_alike(before.weight, after.weight)
    assert torch.allclose(before.weight, after.weight, atol=1e-6)
    states = [value for state in other.state.values() for value in state.values() if value.dim() == 4]
    assert states
    assert all(lies_alike(after.weight, value) for value in states)


def test_muon_itself_takes_gradients_of_any_layout():
    usual, odd = (conv(torch.contiguous_format) for _ in range(2))
    gradient = torch.randn(4, 3, 3, 3)
    usual.weight.grad = gradient.clone()
    odd.weight.grad = gradient.to(memory_format=torch.channels_last)
    for module in (usual, odd):
        optimizer = Muon(module, 0.01, adam_first=0.5)
        for group in optimizer.param_groups:
            group["progress"] = 0.1
        optimizer.step()
    assert torch.equal(usual.weight, odd.weight)


def moved(optimizer, module, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["progress"] = 0.2 * seed
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_muon_go_on_like_it(again):
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    optimizer = Muon(module, 0.01, adam_first=0.5)
    moved(optimizer, module, 1)
    other, other_module = again((optimizer, module))
    for seed in (2, 3):
        ours, theirs = moved(optimizer, module, seed), moved(other, other_module, seed)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_closure_is_called_and_its_loss_returned():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    before = module.weight.detach().clone()
    optimizer = Muon(module, 0.01)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > 0
    assert not torch.equal(module.weight, before)


def test_muons_count_of_steps_goes_where_the_parameters_are():
    here, there = nn.Linear(4, 3), nn.Linear(4, 3, device="meta")
    optimizer, elsewhere = (Muon(module, 0.01) for module in (here, there))
    moved(optimizer, here, 1)
    elsewhere.load_state_dict(optimizer.state_dict())
    assert {value.device.type for state in elsewhere.state.values() for value in state.values()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of 0 or more, got -1"),
        ({"lr": float("nan")}, "lr: expected a finite number of 0 or more, got nan"),
        ({"lr": 0.1, "momentum": 1.5}, r"momentum: expected a share in \[0, 1\), got 1.5"),
        ({"lr": 0.1, "betas": (0.9, 2.0)}, r"betas\[1\]: expected a share in \[0, 1\), got 2"),
        ({"lr": 0.1, "eps": -1e-8}, "eps: expected a finite number of 0 or more, got -1e-08"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Muon(nn.Linear(2, 2), **options)
