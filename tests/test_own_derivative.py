"""Programs on weights whose gradient is not the derivative of their value are refused; kinks and noise run."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from programs import FLOAT
from vma_pyro.infer import REBAR, RELAX, RODEO, DoubleCV

X = torch.tensor([0.1, -0.4, 0.7], **FLOAT)
MIX = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.8, -1.1]], **FLOAT)


def reads(how, fn):
    """Three datapoints of a discrete site, of which the mean of the data is read."""

    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(how(pyro.sample("b", fn)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("b", fn)

    return model, guide


def bits():
    return dist.Bernoulli(torch.full((3, 2), 0.4, **FLOAT)).to_event(1)


def values(*probabilities):
    return dist.OneHotCategorical(torch.tensor(probabilities or (0.2, 0.5, 0.3), **FLOAT).expand(3, -1))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context, b):
        return torch.from_numpy(np.round(b.detach().numpy()))

    @staticmethod
    def backward(context, gradient):
        return gradient


def by_numpy(b):
    return b.sum(-1) * torch.from_numpy(np.asarray(np.round(b.detach().numpy()))).sum(-1)


HARD = {
    "compares what it made of bits": (lambda b: (2 * b > 1).double().sum(-1), bits),
    "compares a sum of bits": (lambda b: torch.where(b.sum(-1) > 0.7, 2.0, 0.5), bits),
    "compares a product": (lambda b: b.sum(-1) * (b.prod(-1) >= 0.3), bits),
    "detaches": (lambda b: (b.detach() ** 2).sum(-1) + b[..., 0], bits),
    "rounds in numpy": (by_numpy, bits),
    "a gradient of its own": (lambda b: 3 * StraightThrough.apply(b).sum(-1), bits),
    "compares what it made of a value": (lambda a: (a[..., 1] - a[..., 0] > 0.1).double(), values),
    "scales the gradient": (lambda a: (MIX[0] * (2 * a - a.detach())).sum(-1), values),
}


@pytest.mark.parametrize(("kind", "make"), [*((kind, REBAR) for kind in HARD), ("detaches", RELAX)])
def test_what_is_no_derivative_is_refused(kind, make):
    how, fn = HARD[kind]
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"^site 'b': expected log w with its own derivative in the weights"
    ) as error:
        make(1).differentiable_loss(*reads(how, fn()), X)
    assert "\n" not in str(error.value)
    assert f"as {make.__name__} needs" in str(error.value)
    assert RELAX(1, reads_softly=False).differentiable_loss(*reads(how, fn()), X).isfinite()


def test_a_jump_is_seen_beside_whatever_else_moves():
    """A large move in another element, and a large constant, hide none; the weights of a bit are far from 1/2."""

    def model(x):
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2, **FLOAT)).to_event(1))
            pyro.sample("far", dist.Normal(20 * b[..., 0], 1.0), obs=torch.zeros(3, **FLOAT))
            pyro.sample("x", dist.Normal(2 * (2 * b[..., 1] > 1).to(b), 1.0), obs=x)
            pyro.factor("constant", torch.tensor(-1e5, **FLOAT))

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=torch.tensor([-9.0, -0.3], **FLOAT)).to_event(1))

    with pytest.raises(ValueError, match="expected log w with its own derivative"):
        REBAR(1).differentiable_loss(model, guide, X)


INSIDE = {
    "a product": lambda a: 3 * ((2 * a).prod(-1) > 0.05).to(a),
    "the smallest": lambda a: 3 * (a.amin(-1) > 0.05).to(a),
    "the largest": lambda a: 3 * (a.amax(-1) > 0.4).to(a),
}


@pytest.mark.parametrize("how", INSIDE.values(), ids=INSIDE)
def test_a_jump_inside_the_simplex_is_seen(how):
    """On no line from one value to another is there one."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected log w with its own derivative"):
        REBAR(1).differentiable_loss(*reads(how, values()), X)


def test_what_weights_hide_at_first_is_seen_later():
    """A last layer that begins at zero shows no jump."""
    weight = torch.zeros((), **FLOAT)
    pair = reads(lambda b: weight * (2 * b > 1).double().sum(-1), bits())
    elbo = REBAR(1)
    elbo.differentiable_loss(*pair, X)
    weight += 1
    for _ in range(8):
        elbo.differentiable_loss(*pair, X)
    with pytest.raises(ValueError, match="expected log w with its own derivative"):
        elbo.differentiable_loss(*pair, X)  # the tenth


def leaky(h):
    return torch.where(h > 0, h, 0.3 * h)


SOFT = {
    "a leaky unit by hand": (lambda b: leaky(leaky(b @ MIX[:, :2] - 0.3) @ MIX[:, 1:]).sum(-1), bits),
    "a steep unit": (lambda b: torch.tanh(1000 * (b.sum(-1) - 0.9)), bits),
    "a logarithm near 0": (lambda b: (b + 1e-10).log().sum(-1), bits),
    "a transform and back": (lambda b: torch.fft.ifft(b.to(torch.complex128)).real.sum(-1), bits),
    "a rate": (lambda b: (3 * b.sum(-1) + 1e-6).log(), bits),
    "a clamp": (lambda b: 3 * b.mean(-1).clamp(1e-4, 1 - 1e-4).logit(), bits),
    "confident rows": (lambda a: (a @ torch.tensor([1e-3, 0.5, 1 - 1e-3], **FLOAT)).log(), values),
    "a layer norm": (lambda b: nn.functional.layer_norm(b @ MIX, (3,))[..., 0], bits),
    "the largest by max": (lambda b: (b @ MIX).max(-1).values, bits),
    "the two largest": (lambda b: (b @ MIX).topk(2).values.sum(-1), bits),
    "a dropout": (lambda b: nn.functional.dropout(b @ MIX, 0.5).sum(-1), bits),
    "large values": (lambda b: 1e4 * (b @ MIX).sum(-1) ** 2, bits),
    "another comparison": (lambda b: b.sum(-1) + (torch.ones(3, **FLOAT) > 0.5), bits),
    "a value": (lambda a: torch.sin(3 * (a * MIX[0]).sum(-1)), values),
    "values of which one is possible": (lambda a: (a * MIX[0]).sum(-1), lambda: values(0.0, 1.0, 0.0)),
    "an impossible value": (lambda a: (a * MIX[0]).sum(-1) ** 2, lambda: values(0.0, 0.6, 0.4)),
}


@pytest.mark.parametrize(("kind", "make"), [*((kind, REBAR) for kind in SOFT), ("a dropout", RELAX)])
def test_what_is_continuous_runs(kind, make):
    how, fn = SOFT[kind]
    torch.manual_seed(0)
    assert make(2).differentiable_loss(*reads(how, fn()), X).isfinite()


def test_a_pair_is_looked_at_once_and_the_noise_stays():
    calls = []

    def how(b):
        calls.append(1)
        return b.sum(-1)

    pair = reads(how, bits())
    elbo = REBAR(1, max_plate_nesting=1)
    torch.manual_seed(3)
    first = elbo.differentiable_loss(*pair, X).item()
    looked, calls[:] = len(calls), []
    torch.manual_seed(3)
    assert elbo.differentiable_loss(*pair, X).item() == first
    assert len(calls) == 2
    assert looked >= 2 + 3 * 18
    REBAR(2, max_plate_nesting=1).differentiable_loss(*pair, X)  # another objective need not look again
    assert len(calls) == 4


def test_it_says_how_far_off():
    pair = reads(lambda b: (2 * b > 1).double().sum(-1), bits())
    with pytest.raises(ValueError, match="nats between two of them where the gradient says") as error:
        REBAR(1).differentiable_loss(*pair, X)
    moved, expected = (float(v) for v in re.findall(r"got (\S+) nats .* says (\S+):", str(error.value))[0])
    assert abs(moved - expected) > 0.1


def test_looking_leaves_no_trace():
    """Statistics of a batch norm are those of the run itself, as without the look."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

        def forward(self, x):
            with pyro.plate("data", 3):
                b = pyro.sample("b", bits())
                of_rows = self.norm(b.flatten(0, -2)).unflatten(0, b.shape[:-1])
                pyro.sample("x", dist.Normal(of_rows.sum(-1), 1.0), obs=x)

    model, (_, guide) = Model(), reads(None, bits())
    REBAR(1, max_plate_nesting=1).differentiable_loss(model, guide, X)
    assert model.training
    assert model.norm.num_batches_tracked == 2  # on values, and on weights


def test_a_function_that_holds_a_batch_norm_leaves_none_either():
    norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def how(b):
        pyro.module("norm", norm)
        return norm(b.flatten(0, -2)).unflatten(0, b.shape[:-1]).sum(-1)

    REBAR(1, max_plate_nesting=1).differentiable_loss(*reads(how, bits()), X)
    assert norm.training
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("make", [REBAR, RELAX, RODEO, DoubleCV])
def test_bits_that_are_masked_and_not_read(make):
    """log w does not depend on them, and has no graph."""
    fn = dist.Bernoulli(torch.full((3, 2), 0.4, **FLOAT)).to_event(1)

    def program(x, guide=False):
        with pyro.plate("data", 3):
            with pyro.poutine.mask(mask=False):
                pyro.sample("b", fn)
            if not guide:
                pyro.sample("x", dist.Normal(torch.zeros((), **FLOAT), 1.0), obs=x)

    loss = make(2).differentiable_loss(program, lambda x: program(x, guide=True), X)
    assert loss.item() == pytest.approx(-dist.Normal(0.0, 1.0).log_prob(X).sum().item())


@pytest.mark.parametrize("scale", [0.1, 0.01])
def test_a_deep_decoder_of_many_pixels_runs(scale):
    """In float32, with log w of thousands of nats, whose rounding is larger than what a step may be off."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 64), *(layer for _ in range(3) for layer in (nn.LeakyReLU(0.1), nn.Linear(64, 64)))]
    decoder, fn = nn.Sequential(*layers, nn.Linear(64, 784)), dist.Bernoulli(torch.full((4, 4), 0.5)).to_event(1)

    def program(x, guide=False):
        with pyro.plate("data", 4):
            b = pyro.sample("b", fn)
            if not guide:
                pyro.sample("x", dist.Normal(decoder(b), scale).to_event(1), obs=x)

    assert REBAR(1).differentiable_loss(program, lambda x: program(x, guide=True), torch.zeros(4, 784)).isfinite()
