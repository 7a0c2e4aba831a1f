"""A guide may prepare the arguments of both programs: once for each estimate, and nothing else changes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from programs import CATEGORICAL
from vma_pyro.infer import (
    NVIL,
    CriticELBO,
    EnumeratedReference,
    MultiSampleELBO,
    compare,
    draw_particles,
    log_weights,
    log_weights_given,
    make,
)

N, S = 4, 3
X = torch.tensor([0.3, 1.0, -0.5, 0.2])
FEATURES = torch.tensor([-1.0, 0.2, 1.5])


def encode(weight, entries):
    """What both programs need of the entries, and what is costly."""
    return entries if entries.requires_grad else weight * entries  # prepared ones stay as they are


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, entries, x):
        means = encode(self.weight, entries)
        with pyro.plate("data", N):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(S)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            weights = a if a.is_floating_point() else nn.functional.one_hot(a, S).float()
            pyro.sample("x", dist.Normal(z + weights @ means, 1.0), obs=x)


class Guide(nn.Module):
    """Prepares nothing; the subclass does."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.logits = weight, nn.Parameter(torch.zeros(N, S))
        self.prepared = []

    def forward(self, entries, x):
        encode(self.weight, entries)
        with pyro.plate("data", N):
            pyro.sample("a", dist.Categorical(logits=self.logits))
            pyro.sample("z", dist.Normal(self.weight.sum() * x, 1.0))


class Preparing(Guide):
    def prepare(self, entries, x):
        self.prepared.append(torch.is_grad_enabled())
        return encode(self.weight, entries), x


def pair(kind):
    weight = nn.Parameter(torch.tensor([0.7, 1.1, 0.9]))
    return Model(weight), kind(weight)


def estimate(elbo, kind, wrap=lambda program: program):
    """Loss, gradients, and the calls of `prepare`."""
    model, guide = pair(kind)
    torch.manual_seed(0)
    loss = elbo.differentiable_loss(model, wrap(guide), FEATURES, x=X)
    gradients = torch.autograd.grad(loss, [model.weight, guide.logits], allow_unused=True)
    flat = [torch.zeros(()) if g is None else g.flatten() for g in gradients]
    return torch.cat([loss.detach()[None], *(f.reshape(-1) for f in flat)]), guide.prepared


SAME = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("name", CATEGORICAL)
def test_once_for_each_estimate_with_its_gradients(name):
    want, none = estimate(make(name, 3, site="a"), Guide)
    found, prepared = estimate(make(name, 3, site="a"), Preparing)
    torch.testing.assert_close(found, want, **SAME)
    assert (none, prepared) == ([], [True])
    model, guide = pair(Preparing)
    make(name, 3, site="a").loss(model, guide, FEATURES, X)
    assert guide.prepared == [False]


@pytest.mark.parametrize("options", [{"vectorize_particles": False}, {"chunk_size": 2}, {"draws_per_score": 2}])
def test_once_however_often_the_programs_run(options):
    elbo = MultiSampleELBO(4, max_plate_nesting=None, **options)
    torch.testing.assert_close(estimate(elbo, Preparing)[0], estimate(elbo, Guide)[0], **SAME)
    assert estimate(elbo, Preparing)[1] == [True]


@pytest.mark.parametrize("by_value", [False, True])
def test_once_for_a_reference(by_value):
    elbo = EnumeratedReference(2, sites=["a"], by_value=by_value, max_plate_nesting=1)
    torch.testing.assert_close(estimate(elbo, Preparing)[0], estimate(elbo, Guide)[0], **SAME)
    assert estimate(elbo, Preparing)[1] == [True]


def test_within_handlers_that_leave_parameters_alone():
    elbo = MultiSampleELBO(3, max_plate_nesting=1)
    assert estimate(elbo, Preparing, poutine.scale(scale=1.0))[1] == [True]
    assert estimate(elbo, Preparing, lambda guide: poutine.lift(guide, prior={}))[1] == []


def test_what_learns_sees_the_arguments_as_they_were_given():
    class Network(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(size))

        def forward(self, entries, x):
            assert entries is FEATURES
            return self.scale * x[:, None]

    for elbo in (CriticELBO(3, critic=Network(S), site="a"), MultiSampleELBO(3, baseline=NVIL(Network(1)))):
        assert estimate(elbo, Preparing)[1] == [True]


def test_weights():
    options = {"num_particles": 3, "max_plate_nesting": 1}
    values = {"a": torch.arange(S)}
    for draw in (
        lambda *pair: draw_particles(*pair, (FEATURES,), {"x": X}, **options).log_weights,
        lambda *pair: log_weights(*pair, (FEATURES,), {"x": X}, **options),
        lambda *pair: log_weights_given(values, *pair, (FEATURES,), {"x": X}, **options),
    ):
        found = []
        for kind in (Guide, Preparing):
            torch.manual_seed(0)
            model, guide = pair(kind)
            found.append(draw(model, guide))
        torch.testing.assert_close(*found, **SAME)
        assert guide.prepared == [True]


def test_a_comparison():
    estimators = {"vimco": make("vimco", 2), "pyro-enum": make("pyro-enum", 2)}
    rows = [
        compare(*pair(kind), (FEATURES, X), estimators=estimators, draws=4, show_progress=False).rows
        for kind in (Guide, Preparing)
    ]
    for one, other in zip(*rows, strict=True):
        assert one.relative_variance == pytest.approx(other.relative_variance, rel=1e-3)
