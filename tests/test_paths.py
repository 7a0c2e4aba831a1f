"""Programs that jump in a draw: refused where gradients pass through it, and right with a score instead."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

from programs import FLOAT
from vma_pyro.infer import RLOO, make

T = torch.linspace(-2, 2, 9, **FLOAT)
START = -0.4
SERIES = torch.where(T < 0.4, 1.0, -1.0)


def pair(how, *, learned=True, score=False, rows=2):
    """Series [rows, 9] whose mean is made of a Gaussian draw, and of a bit beside it."""
    loc = torch.full((rows,), START, **FLOAT, requires_grad=True)

    def model(x):
        with pyro.plate("data", rows):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5, **FLOAT)))
            z = pyro.sample("z", dist.Normal(torch.zeros((), **FLOAT), 1.0))
            pyro.sample("x", dist.Normal(how(z[..., None]) + 0.1 * b[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", rows):
            pyro.sample("b", dist.Bernoulli(logits=loc - 0.5))
            fn = dist.Normal(loc if learned else loc.detach(), 0.7)
            pyro.sample("z", fn.has_rsample_(False) if score else fn)

    return model, guide, loc, SERIES.expand(rows, 9)


def change_point(z):
    return torch.where(z > T, 1.0, -1.0)


JUMPS = {
    "a change point": (change_point, "gt"),
    "a derived comparison": (lambda z: (3 * z - T > 0).double(), "gt"),
    "a rounding": (lambda z: (4 * z).round() * T, "round"),
    "a table": (lambda z: T[(2 * z + 4).clamp(0, 8).long()] + 0 * T, "long"),
    "a sign": (lambda z: z.sign() * T, "sign"),
    "a comparison of a copy": (lambda z: torch.where(z.detach() > 0, 1.0, -1.0) * T, "gt"),
    "a comparison of data": (lambda z: (z.data > 0).double() * T, "gt"),
    "a bin": (lambda z: torch.bucketize(z.clone(), T).to(z) + 0 * T, "bucketize"),
    "a remainder": (lambda z: (z % 0.5) * 3 * T, "remainder"),
}


@pytest.mark.parametrize(("how", "operation"), JUMPS.values(), ids=JUMPS)
def test_what_jumps_is_refused(how, operation):
    model, guide, _, x = pair(how)
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"^site 'z': expected log w with its own derivative in its value"
    ) as error:
        make("vimco", 2, site="b").loss_and_grads(model, guide, x)
    assert "\n" not in str(error.value)
    assert f"({operation})" in str(error.value)


@pytest.mark.parametrize("name", ["rloo", "exact", "disarm", "loo+dreg", "vimco+resampled", "pyro-graph"])
def test_all_that_differentiate_through_draws_refuse_it(name):
    model, guide, _, x = pair(change_point)
    with pytest.raises(ValueError, match="site 'z': expected log w with its own derivative"):
        make(name, 2, site="b").loss_and_grads(model, guide, x)


@pytest.mark.parametrize("name", ["wake-wake", "wake-sleep", "tvo"])
def test_what_holds_draws_fixed_runs(name):
    model, guide, _, x = pair(change_point)
    make(name, 2, site="b").loss_and_grads(model, guide, x)


def test_without_gradients_or_without_parameters_behind_it_a_jump_is_no_harm():
    model, guide, _, x = pair(change_point)
    assert math.isfinite(make("vimco", 2, site="b").loss(model, guide, x))
    model, guide, _, x = pair(change_point, learned=False)
    make("vimco", 2, site="b").loss_and_grads(model, guide, x)


def _between(z):
    """Values between the squares of T, on straight lines."""
    right = torch.searchsorted(T, z.clamp(-1.9, 1.9).contiguous())
    part = (z.clamp(-1.9, 1.9) - T[right - 1]) / (T[right] - T[right - 1])
    return torch.lerp(T[right - 1] ** 2, T[right] ** 2, part)


SMOOTH = {
    "a unit by hand": lambda z: torch.where(z > 0.1, z - 0.1, 0.3 * (z - 0.1)) * T,
    "a clamp by comparison": lambda z: torch.where(z > 1, torch.ones_like(z), z) * T,
    "the largest": lambda z: torch.stack(
        [z.expand(z.shape[:-1] + T.shape), T.expand(z.shape[:-1] + T.shape)], -1
    ).max(-1)[0],
    "a steep unit": lambda z: torch.tanh(20 * (z - T)),
    "a logarithm of at least so much": lambda z: torch.where(z > 1e-6, z.clamp(min=1e-6), 1e-6).log() * T / 20,
    "between the points of a table": lambda z: _between(z) * T,
    "a comparison of other things": lambda z: z * (T > 0.5),
}


@pytest.mark.parametrize("how", SMOOTH.values(), ids=SMOOTH)
def test_what_is_continuous_runs(how):
    model, guide, loc, x = pair(how)
    make("vimco", 2, site="b").loss_and_grads(model, guide, x)
    assert loc.grad.isfinite().all()


def test_with_a_score_the_gradient_of_a_change_point_is_right():
    """By quadrature over z: the derivative of sum_t E log p(x_t | z), and of the rest of the ELBO."""
    rows = 8000
    model, guide, loc, x = pair(change_point, score=True, rows=rows)
    torch.manual_seed(0)
    loss = RLOO(4).differentiable_loss(model, guide, x)
    of_rows = -torch.autograd.grad(loss, loc)[0]

    at = torch.tensor(START, **FLOAT, requires_grad=True)
    z = torch.linspace(-7, 7, 20_001, **FLOAT)
    q = dist.Normal(at, 0.7).log_prob(z).exp()
    width = z[1] - z[0]
    total = -torch.distributions.kl_divergence(dist.Normal(at, 0.7), dist.Normal(torch.zeros_like(at), 1.0))
    bit = dist.Bernoulli(logits=at - 0.5)
    total = total - torch.distributions.kl_divergence(bit, dist.Bernoulli(torch.tensor(0.5, **FLOAT)))
    for value, probability in ((0.0, 1 - bit.probs), (1.0, bit.probs)):
        log_p = dist.Normal(change_point(z[:, None]) + 0.1 * value, 1.0).log_prob(SERIES).sum(-1)
        total = total + probability * (q * log_p).sum() * width
    (expected,) = torch.autograd.grad(total, at)
    error = of_rows.std() / math.sqrt(rows)
    assert abs(of_rows.mean() - expected) < 4 * error
    assert error < 0.1 * abs(expected)


def test_a_pair_is_looked_at_once_and_the_noise_stays():
    calls = []

    class Model(nn.Module):
        def forward(self, x):
            calls.append(1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(torch.where(z > 0, z, 0.1 * z), 1.0), obs=x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc.expand(len(x)), 1.0))

    model, guide, x = Model(), Guide(), torch.ones(3)
    elbo = make("vimco", 2, max_plate_nesting=1)
    torch.manual_seed(1)
    first = elbo.differentiable_loss(model, guide, x).item()
    calls.clear()
    torch.manual_seed(1)
    assert elbo.differentiable_loss(model, guide, x).item() == first
    make("rloo", 3, max_plate_nesting=1).differentiable_loss(model, guide, x)
    assert len(calls) == 2


def by_autoguide(how, guide_of):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, **FLOAT), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(w.sum(), 1.0))
        pyro.sample("x", dist.Normal(how(w).sum() + v, 1.0), obs=x)

    return model, guide_of(model)


AUTOGUIDES = [
    lambda model: AutoDiagonalNormal(model, init_scale=1.0),
    lambda model: AutoNormal(model, init_scale=1.0),
    lambda model: AutoMultivariateNormal(model, init_scale=1.0),
]


@pytest.mark.parametrize("guide_of", AUTOGUIDES)
def test_latents_that_are_functions_of_other_draws(guide_of):
    torch.manual_seed(0)
    model, guide = by_autoguide(lambda w: torch.where(w > 0, w, 0.1 * w), guide_of)
    make("rloo", 2, batch_plates=()).loss_and_grads(model, guide, torch.tensor(1.0, **FLOAT))
    model, guide = by_autoguide(lambda w: torch.where(w > 0, 1.0, -1.0), guide_of)
    with pytest.raises(ValueError, match="expected log w with its own derivative"):
        make("rloo", 2, batch_plates=()).loss_and_grads(model, guide, torch.tensor(1.0, **FLOAT))


LATER = {
    "a draw": lambda z: dist.Normal(torch.where(z > 0, 1.0, -1.0), 1.0),
    "a law": lambda z: dist.Bernoulli(torch.where(z > 0, 0.9, 0.1)),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_a_draw_that_jumps_with_the_one_before_it(later):
    """A guide that proposes from the model's own transition: log w is smooth in all draws, and they jump."""
    loc = torch.zeros(2, **FLOAT, requires_grad=True)

    def program(x, guide=False):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(loc if guide else torch.zeros(2, **FLOAT), 1.0))
            y = pyro.sample("y", later(z))
            if not guide:
                pyro.sample("x", dist.Normal(y, 0.5), obs=x)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="site 'z': expected log w with its own derivative"):
        make("vimco", 2).loss_and_grads(program, lambda x: program(x, guide=True), torch.full((2,), 2.0, **FLOAT))


def test_programs_with_noise_or_a_state_of_their_own_are_left_alone():
    """Nothing can be said of them, and they are not run for long."""
    random, calls = np.random.default_rng(0), []

    def how(z):
        calls.append(1)
        return torch.where(z > 0, z, 0.1 * z) * T + float(random.normal())

    model, guide, _, x = pair(how)
    make("vimco", 2, site="b").loss_and_grads(model, guide, x)
    assert len(calls) < 100
