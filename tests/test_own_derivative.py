"""Programs on weights whose gradient is not the derivative of their value are refused; kinks and noise run."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from programs import FLOAT
from vma_pyro.infer import REBAR, RELAX

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


def leaky(h):
    return torch.where(h > 0, h, 0.3 * h)


SOFT = {
    "a leaky unit by hand": (lambda b: leaky(leaky(b @ MIX[:, :2] - 0.3) @ MIX[:, 1:]).sum(-1), bits),
    "a steep unit": (lambda b: torch.tanh(40 * (b.sum(-1) - 0.9)), bits),
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
    assert looked >= 2 + 33
    REBAR(2, max_plate_nesting=1).differentiable_loss(*pair, X)  # another objective need not look again
    assert len(calls) == 4


def test_it_says_how_far_off():
    pair = reads(lambda b: (2 * b > 1).double().sum(-1), bits())
    with pytest.raises(ValueError, match="nats on the way to another value where the gradient says") as error:
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
