"""Double control variates: exact over all values for any alpha, less noise once it is known, what is refused."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_coupled import NAMES, objective

from programs import FLOAT, Binary, Fixed, Mixed, Value, rows
from vma_pyro.infer import RLOO, DoubleCV, RelaxedELBO, dreg, iwae, stl
from vma_pyro.infer.engine.programs import Programs


def with_alpha(alpha, K):
    elbo = DoubleCV(K, max_plate_nesting=1)
    elbo.slope.product.fill_(-alpha)
    elbo.slope.square.fill_(1.0)
    elbo.slope.eval()
    return elbo


@pytest.mark.parametrize("alpha", [0.0, 0.7, -1.3])
@pytest.mark.parametrize(("second", "K"), [(False, 2), (False, 3), (True, 2)])
def test_bits_over_all_values(alpha, second, K):
    program = Binary(second=second)
    _, log_q = program.tables(rows(program.values, 1))
    outcome = torch.tensor(list(itertools.product(range(log_q.shape[1]), repeat=K))).T  # [K, O]
    weight = log_q[0].detach().exp()[outcome].prod(0)
    values = {"b": program.bits[outcome // 2 if second else outcome].requires_grad_()}
    if second:
        values["c"] = (outcome % 2).double().requires_grad_()
    p = rows(program.values, outcome.shape[1])
    estimate = with_alpha(alpha, K)._estimate(Programs(program.model, Fixed(values)(program.guide), (p,)))
    value, want = objective(program, None)
    assert (weight * estimate.value).sum().item() == pytest.approx(value, abs=1e-10)
    gradients = torch.autograd.grad(estimate.surrogate, [p[n] for n in NAMES], allow_unused=True)
    for name, got in zip(NAMES, gradients, strict=True):
        if got is not None:
            torch.testing.assert_close(torch.einsum("o,o...->...", weight, got), want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.9, -0.6])
@pytest.mark.parametrize("K", [2, 3])
def test_one_hot_values_over_all_values(alpha, K):
    program = Value(4, family=dist.OneHotCategorical)
    outcome = torch.tensor(list(itertools.product(range(4), repeat=K))).T
    weight = program.q[outcome].prod(0)
    values = {"a": torch.nn.functional.one_hot(outcome, 4).double().requires_grad_()}
    p = rows(program.values, outcome.shape[1])
    estimate = with_alpha(alpha, K)._estimate(Programs(program.model, Fixed(values)(program.guide), (p,)))
    value, want = program.objective()
    assert (weight * estimate.value).sum().item() == pytest.approx(value, abs=1e-10)
    for got, wanted in zip(torch.autograd.grad(estimate.surrogate, list(p.values())), want, strict=True):
        torch.testing.assert_close(torch.einsum("o,os->s", weight, got), wanted, rtol=1e-9, atol=1e-10)


def test_alpha_is_that_of_the_least_variance():
    """From 200 draws of 50 datapoints; leave-one-out has more than twice the variance."""
    found = []
    for elbo in (RLOO(2, max_plate_nesting=1), DoubleCV(2, max_plate_nesting=1)):
        program, gradients = Binary(second=False), []
        for seed in range(200):
            torch.manual_seed(seed)
            p = rows(program.values, 50)
            estimate = elbo._estimate(Programs(program.model, program.guide, (p,)))
            gradients.append(torch.autograd.grad(estimate.surrogate, p["guide_b"])[0])
        found.append(torch.cat(gradients[50:]).var(0).sum().item())
    assert found[1] < 0.5 * found[0]


def test_alpha_moves_in_training_only_and_is_kept():
    program, elbo = Mixed(), DoubleCV(2)
    p, x = rows(program.values, 5), program.x.expand(5).clone()
    module = elbo(program.model, program.guide)
    module.eval()
    module(p, x)
    assert elbo.slope.square == 0
    module.train()
    module(p, x)
    assert elbo.slope.square > 0
    assert {"slope.product", "slope.square"} <= set(module.state_dict())
    again = DoubleCV(2)
    again(program.model, program.guide).load_state_dict(module.state_dict())
    assert again.slope.value() == elbo.slope.value() != 0


def program_of(fn):
    def run():
        with pyro.plate("data", 2):
            pyro.sample("a", fn)

    return run


def by_integer():
    with pyro.plate("data", 2):
        a = pyro.sample("a", dist.Categorical(torch.ones(2, 3)))
        pyro.sample("x", dist.Normal(torch.arange(3.0)[a], 1.0), obs=torch.zeros(2))


@pytest.mark.parametrize(
    ("program", "guide", "message"),
    [
        (
            program_of(dist.Poisson(torch.ones(2))),
            None,
            "expected a Categorical, .* or Bernoulli .* Poisson",
        ),
        (
            by_integer,
            program_of(dist.Categorical(torch.ones(2, 3))),
            "expected a program that reads weights",
        ),
    ],
)
def test_what_is_refused(program, guide, message):
    with pytest.raises(ValueError, match=f"^site 'a': {message}") as error:
        DoubleCV(2).loss(program, guide or program)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^vectorize_particles: expected True for DoubleCV, got False$"):
        DoubleCV(2, vectorize_particles=False)
    with pytest.raises(ValueError, match="^decay: expected 0 <= decay < 1, got 1$"):
        DoubleCV(2, decay=1)


def bit_of(model_family, guide_family):
    def model():
        with pyro.plate("data", 2):
            b = pyro.sample("b", model_family)
            pyro.sample("x", dist.Normal(b.sum(-1) if b.dim() > 1 else b, 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("b", guide_family)

    return model, guide


@pytest.mark.parametrize("elbo", [DoubleCV(2), RelaxedELBO(2, site=None), RelaxedELBO(2, site="b")])
@pytest.mark.parametrize(
    ("of_model", "of_guide"),
    [
        (dist.Categorical(torch.tensor([0.95, 0.05])), dist.Bernoulli(torch.tensor([0.6, 0.3]))),
        (dist.OneHotCategorical(torch.ones(2, 3)), dist.OneHotCategorical(torch.ones(2, 4))),
    ],
)
def test_another_family_in_the_model_is_refused(elbo, of_model, of_guide):
    """With as many particles as values its weights would broadcast against the wrong dimension."""
    with pytest.raises(
        ValueError, match="^site 'b': expected the same family and size in model and guide"
    ) as error:
        elbo.loss(*bit_of(of_model, of_guide))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("K", [2, 4])
def test_an_infinite_derivative_at_a_bit_leaves_the_rest_alone(K):
    """The root of a bit is a number, its derivative at 0 is not."""
    logits = torch.zeros(3, **FLOAT, requires_grad=True)

    def model():
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.4, **FLOAT)))
            pyro.sample("x", dist.Normal(0.0, 1.0 + b.sqrt()), obs=torch.arange(3.0, **FLOAT))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    elbo = DoubleCV(K)
    for seed in range(4):
        torch.manual_seed(seed)
        loss = elbo.differentiable_loss(model, guide)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert elbo.slope.value().isfinite()
    assert elbo.slope.square.isfinite()


@pytest.mark.parametrize("rule", [stl, dreg])
def test_a_pathwise_rule_beside_it(rule):
    """A bound of its own for each particle: stl, whose mean is that of the plain gradient; 20,000 datapoints."""
    count, found = 20_000, []
    for asked in (rule, iwae):
        loc = torch.full((count,), 0.3, **FLOAT, requires_grad=True)

        def model():
            with pyro.plate("data", count):
                b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.4, **FLOAT)))
                z = pyro.sample("z", dist.Normal(b, torch.ones((), **FLOAT)))
                pyro.sample("x", dist.Normal(z, torch.ones((), **FLOAT)), obs=torch.ones(count, **FLOAT))

        def guide(loc=loc, asked=asked):
            with pyro.plate("data", count):
                b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.5, **FLOAT)))
                pyro.sample("z", dist.Normal(b + loc, torch.ones((), **FLOAT)), infer={"estimator": asked})

        torch.manual_seed(0)
        found.append(torch.autograd.grad(DoubleCV(2).differentiable_loss(model, guide), loc)[0])
    difference = found[0].mean() - found[1].mean()
    assert difference.abs() < 4.5 * ((found[0].var() + found[1].var()) / count).sqrt()
    assert found[0].mean().abs() > 0.05
