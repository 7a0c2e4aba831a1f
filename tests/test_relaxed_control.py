"""REBAR and RELAX: the noise that is shared, what their control variates learn, and what is refused."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from test_rebar import Opinion, SoftBinary, with_parameters
from torch import nn

from programs import FLOAT, SUBSAMPLING, Binary, Mixed, rows
from vma_pyro.infer import REBAR, RELAX, RelaxationCritic

# What the control learns.


def test_the_noise_of_reparameterised_sites_is_shared():
    """f(x), c(z) and c(z given x) of a draw see one eps, also where z depends on the value."""
    seen = []

    class Watched(Mixed):
        def guide(self, p, x):
            with self._plate(x):
                a = pyro.sample("a", dist.Categorical(logits=p["address"]))
                loc, scale = self.read(p["loc"], a), self.read(p["log_scale"], a).exp()
                seen.append(((pyro.sample("z", dist.Normal(loc, scale)) - loc) / scale).detach())

    program = Watched()
    p, x = rows(program.values, 5), program.x.expand(5).clone()
    REBAR(3, max_plate_nesting=1).differentiable_loss(program.model, program.guide, p, x)
    first, second = seen[-2:]
    assert first.shape == (3, 5)
    assert first.unique().numel() == 15
    torch.testing.assert_close(second, torch.cat([first, first]))


@pytest.mark.parametrize("make", [REBAR, lambda *a, **o: RELAX(*a, critic=Opinion(2), **o)])
def test_the_control_follows_the_squared_gradient_of_the_draw(make):
    """By central differences of sum_b |grad phi|^2 on the same noise; in eval mode nothing is learned."""
    elbo = with_parameters(make(1, max_plate_nesting=1), 0.7, 0.6)
    program = SoftBinary(second=False)

    def gradient():
        torch.manual_seed(3)
        p = rows(program.values, 40)
        loss = elbo.differentiable_loss(program.model, program.guide, p)
        loss.backward()
        return [p[n].grad for n in ("prior_b", "mean", "guide_b")]

    learned = [q for part in elbo.learned_parts().values() for q in part.parameters()]
    trained = gradient()
    got = [q.grad.clone() for q in learned]
    for part in elbo.learned_parts().values():
        part.eval()
        part.zero_grad()
    for a, b in zip(gradient(), trained, strict=True):
        assert torch.equal(a, b)
    assert all(q.grad is None for q in learned)

    def square():
        return (gradient()[-1] / SUBSAMPLING).square().sum().item()

    for parameter, gradient_of in zip(learned, got, strict=True):
        flat = parameter.data.view(-1)
        for i in range(min(2, len(flat))):
            at, found = flat[i].item(), []
            for step in (1e-5, -1e-5):
                flat[i] = at + step
                found.append(square())
            flat[i] = at
            want = SUBSAMPLING * (found[0] - found[1]) / 2e-5
            assert gradient_of.view(-1)[i].item() == pytest.approx(want, rel=1e-5)
            assert abs(want) > 1e-3


def small():
    return RelaxationCritic(2, hidden=9)


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda: REBAR(1, temperature=0.3, eta=0.3, max_plate_nesting=1), 4),
        (lambda: RELAX(1, critic=small(), temperature=0.3, eta=0.3, max_plate_nesting=1), 4),
        (lambda: RELAX(1, reads_softly=False, critic=small(), max_plate_nesting=1), 1.5),
    ],
)
def test_what_is_learned_lowers_the_variance(make, factor):
    """100 updates of Adam on 64 datapoints; on 10,000 others the score alone has so many times the variance."""
    program, elbo = SoftBinary(second=False), make()
    torch.manual_seed(0)
    pyro.enable_validation(False)

    def variance(elbo):
        for part in elbo.learned_parts().values():
            part.eval()
        p = rows(program.values, 10_000)
        loss = elbo.differentiable_loss(program.model, program.guide, p)
        return torch.autograd.grad(loss, p["guide_b"])[0].var(0).sum().item()

    start = variance(elbo)
    module = elbo(program.model, program.guide).train()
    optimizer = torch.optim.Adam([q for part in elbo.learned_parts().values() for q in part.parameters()], 0.03)
    for _ in range(100):
        optimizer.zero_grad()
        module(rows(program.values, 64)).backward()
        optimizer.step()
    learned = variance(elbo)
    assert learned < 0.9 * start
    assert learned < variance(REBAR(1, eta=0.0, max_plate_nesting=1)) / factor


def bits():
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.4, 0.7])).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide


@pytest.mark.parametrize("elbo", [REBAR(2), RELAX(2), RELAX(1, reads_softly=False)])
def test_svi_trains_the_control_along(elbo):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = [q.detach().clone() for part in elbo.learned_parts().values() for q in part.parameters()]
    svi = SVI(*bits(), Adam({"lr": 0.01}), elbo)
    for _ in range(3):
        svi.step(torch.tensor([0.3, 1.2, 1.9]))
    after = [q for part in elbo.learned_parts().values() for q in part.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) >= 2
    assert len(moved) in (2, 4, 6)
    assert svi.evaluate_loss(torch.tensor([0.3, 1.2, 1.9])) > 0


@pytest.mark.parametrize("features", [None, 3, 300])
def test_the_critic_takes_so_many_features(features):
    critic = RelaxationCritic(features, hidden=7)
    nn.init.normal_(critic.network[-1].weight)
    z = torch.randn(2, 5, features or 11, **FLOAT).requires_grad_()
    r = critic(z, "an argument")
    assert r.shape == (2, 5, 1)
    (slope,) = torch.autograd.grad(r.sum(), z, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), critic.network[-1].weight)[0].isfinite().all()
    with pytest.raises(ValueError, match="^features: expected at least 1, got 0$"):
        RelaxationCritic(0)
    with pytest.raises(ValueError, match="^hidden: expected an int, got 1.5$"):
        RelaxationCritic(hidden=1.5)


# What is refused.


def refusal(elbo, model, guide, *args):
    with pytest.raises(ValueError, match="expected") as error:
        elbo.differentiable_loss(model, guide, *args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("elbo", [REBAR, RELAX, lambda K: RELAX(K, reads_softly=False)])
def test_a_second_layer_is_refused(elbo, K):
    program = Binary(second=True)
    found = refusal(elbo(K), program.model, program.guide, rows(program.values, 3))
    assert found.startswith("site 'c': expected a distribution that no earlier draw decides, as RE")
    assert found.endswith("relaxes it together with 'b', got one that differs between particles; use RLOO")


def reads(how, family=None):
    of_model, of_guide = (dist.Bernoulli(torch.tensor(probs)).to_event(1) for probs in ([0.4, 0.7], [0.3, 0.6]))

    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample(
                "b", dist.Bernoulli(torch.tensor([0.4, 0.7])).to_event(1) if family is None else family
            )
            pyro.sample("x", dist.Normal(how(b), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", family or of_guide)

    return model, guide


TABLE = torch.tensor([0.3, -0.4])


@pytest.mark.parametrize(
    ("how", "operation"),
    [
        (lambda b: TABLE[b[..., 0].long()], "long"),
        (lambda b: TABLE[b.sum(-1).clamp(max=1).to(torch.int64)], "to"),
        (lambda b: b.round().sum(-1), "round"),
        (lambda b: (2 * b - 0.5).floor().sum(-1), "floor"),
        (lambda b: torch.where(b == 1, 1.0, 0.5).sum(-1), "eq"),
        (lambda b: torch.where(b[..., 0] > 0.5, 1.0, 0.5), "gt"),
    ],
)
def test_a_program_that_rounds_bits_is_refused(how, operation):
    """Its gradient would be that of another function; a critic alone needs none of the program's."""
    x = torch.tensor([0.1, 0.4, 0.7])
    line = (
        "site 'b': expected a program that reads its weights as numbers, with a gradient, got one that rounds or "
        f"compares them ({operation})"
    )
    assert refusal(REBAR(1), *reads(how), x) == refusal(RELAX(1), *reads(how), x) == line
    assert RELAX(1, reads_softly=False).differentiable_loss(*reads(how), x).isfinite()


def test_other_rounding_of_a_program_is_not_looked_at():
    def how(b):
        return b.sum(-1) + (torch.tensor([1.6], requires_grad=True).round() > 1).float()

    assert REBAR(1).differentiable_loss(*reads(how), torch.tensor([0.1, 0.4])).isfinite()


def test_what_cannot_be_relaxed_or_read():
    x = torch.tensor([0.1, 0.4])
    by_integer = reads(lambda a: torch.arange(3.0)[a], dist.Categorical(torch.ones(3)))
    line = "site 'b': expected a program that reads weights [..., S] in the place of integers, as {} needs, got an"
    assert refusal(REBAR(1), *by_integer, x).startswith(line.format("REBAR"))
    assert refusal(RELAX(1), *by_integer, x).startswith(line.format("RELAX"))
    assert RELAX(1, reads_softly=False).differentiable_loss(*by_integer, x).isfinite()
    counts = reads(lambda a: a, dist.Poisson(torch.ones(())))
    for elbo in (REBAR(1), RELAX(1, reads_softly=False)):
        found = refusal(elbo, *counts, x)
        assert found == "site 'b': expected a Categorical, OneHotCategorical or Bernoulli to relax, got Poisson"
    named = REBAR(1, site=("b", "c"))
    assert refusal(named, *bits(), x) == "site 'c': expected a discrete site in the guide, found none"


def test_another_site_beside_it():
    def guide(x, fn):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("y", fn)

    def model(x, fn):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("y", fn)
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = torch.tensor([0.1, 0.4])
    found = refusal(REBAR(1, site="b"), model, guide, x, dist.Bernoulli(torch.tensor(0.3)))
    assert found == "site 'y': expected a reparameterised site beside 'b', got one that is not"
    gamma = dist.Gamma(torch.tensor(2.0), torch.tensor(1.0))
    found = refusal(REBAR(1), model, guide, x, gamma)
    assert found.startswith(
        "site 'y': expected a location-scale family for common noise (Normal, Laplace, Cauchy)"
    )
    assert RELAX(1, reads_softly=False).differentiable_loss(model, guide, x, gamma).isfinite()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: REBAR(0), "num_particles: expected at least 1, got 0"),
        (lambda: REBAR(1, temperature=0.0), "temperature: expected more than 0, got 0.0"),
        (lambda: RELAX(1, temperature=-1.0), "temperature: expected more than 0, got -1.0"),
        (lambda: REBAR(2, noise="common"), "noise: expected 'independent' for REBAR, got 'common'"),
        (lambda: RELAX(2, vectorize_particles=False), "vectorize_particles: expected True for RELAX, got False"),
        (lambda: RELAX(critic="mlp"), "critic: expected an nn.Module, got 'mlp'"),
    ],
)
def test_arguments(make, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        make()


def test_a_critic_of_another_shape_is_refused():
    x = torch.tensor([0.1, 0.4])
    narrow = refusal(RELAX(1, critic=RelaxationCritic(3)), *bits(), x)
    assert narrow.startswith("critic: expected to take z [1, 2, 2], got an error (")

    class Wide(nn.Module):
        def forward(self, z, *args):
            return z

    assert refusal(RELAX(1, critic=Wide()), *bits(), x) == "critic: expected output [1, 2] of z, got [1, 2, 2]"
