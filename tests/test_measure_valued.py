"""Measure-valued derivatives: over all their noise against enumeration; what they cost, what is refused."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_coupled import NAMES, objective

from programs import FLOAT, Binary, Discrete, Mixed, Value, log_normal, rows
from vma_pyro.infer import RLOO, MeasureValued, dreg
from vma_pyro.infer.comparison.evaluations import count_evaluations
from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.programs import Programs

ONE = torch.tensor(1.0, **FLOAT)


@pytest.fixture
def draws(monkeypatch):
    """Values [runs, rows, ...] that sites are given instead of drawn ones; those of the first runs are enough."""
    given = {}

    def draw(msg):
        value = msg["fn"]()
        own = given.get(msg["name"])
        if callable(own):
            return own(msg["fn"])
        if own is not None:
            forced = own.to(value.dtype)
            value[: len(forced)] = forced
        return value

    monkeypatch.setattr(handlers, "draw", draw)
    return given


def estimate(program, p, *args, **options):
    elbo = MeasureValued(1, max_plate_nesting=1, **options)
    return elbo._estimate(Programs(program.model, program.guide, (p, *args)))


def check_mean(found, p, names, weight, value, want):
    assert (weight * found.value).sum().item() == pytest.approx(value, abs=1e-10)
    gradients = torch.autograd.grad(found.surrogate, [p[n] for n in names], allow_unused=True)
    for name, got in zip(names, gradients, strict=True):
        if want[name] is not None and got is not None:
            got = torch.einsum("o,o...->...", weight, got)
            torch.testing.assert_close(got, want[name], rtol=1e-9, atol=1e-10)
        else:
            assert want[name] is None or not want[name].any()


@pytest.mark.parametrize("second", [False, True])
def test_bits_over_all_values(second, draws):
    """The third bit is drawn anew where one of the first two is flipped: all values of these draws, too."""
    program = Binary(second=second)
    table = rows(program.values, 1)
    log_q = program.tables(table)[1][0].detach()
    outcomes = torch.tensor(list(itertools.product(range(4), *[range(2)] * (3 if second else 0))))
    row = outcomes[:, 0]
    draws["b"] = program.bits[row][None]
    if second:
        conditional = log_q.view(4, 2).log_softmax(-1)
        visited = torch.stack([row, row ^ 2, row ^ 1])  # the draw, and each bit flipped
        draws["c"] = outcomes[:, 1:].T
        weight = (log_q.view(4, 2).logsumexp(-1)[row] + conditional[visited, outcomes[:, 1:].T].sum(0)).exp()
    else:
        weight = log_q.exp()
    assert weight.sum().item() == pytest.approx(1)
    p = rows(program.values, len(outcomes))
    value, want = objective(program, None)
    check_mean(estimate(program, p), p, NAMES, weight, value, want)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_two_categorical_sites_over_all_values(kind, draws):
    """Five values and two, with a scale; the second masked, or all of it."""
    program = Discrete()
    S, T = 5, 2
    outcomes = torch.tensor(list(itertools.product(range(S), *[range(T)] * S)))  # a, b, b for other values of a
    kinds = torch.full((len(outcomes),), kind)
    p = rows(program.values, len(outcomes))
    log_w, log_q = (t[0] for t in program.tables(p, kinds))
    q = log_q.detach().view(S, T)
    visited = (outcomes[:, :1] + torch.arange(S)).T % S
    weight = (q.logsumexp(-1)[outcomes[:, 0]] + q.log_softmax(-1)[visited, outcomes[:, 1:].T].sum(0)).exp()
    draws["a"], draws["b"] = outcomes[None, :, 0], outcomes[:, 1:].T
    bound = (log_q.exp() * log_w).sum()
    names = list(p)
    want = torch.autograd.grad(bound, [p[n] for n in names], allow_unused=True)
    want = {n: None if g is None else g[0] for n, g in zip(names, want, strict=True)}
    check_mean(estimate(program, p, kinds), p, names, weight, bound.item(), want)


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("impossible", [0, 2])
def test_one_site_has_no_noise(family, impossible):
    """Whatever is drawn; values of probability zero have no part in it."""
    program = Value(6, family=family, impossible=impossible)
    value, want = program.objective()
    for seed in range(3):
        torch.manual_seed(seed)
        p = rows(program.values, 7)
        found = estimate(program, p)
        torch.testing.assert_close(found.value, torch.full((7,), value, **FLOAT), rtol=1e-10, atol=1e-10)
        for got, wanted in zip(torch.autograd.grad(found.surrogate, list(p.values())), want, strict=True):
            torch.testing.assert_close(got, wanted.expand(7, -1), rtol=1e-9, atol=1e-10)


def test_a_gaussian_after_the_value_given_its_noise(draws):
    """All values meet the same noise: the sum over them, in plain torch, whatever value was drawn."""
    program, count = Mixed(), 6
    p, x = rows(program.values, count), program.x.expand(count).clone()
    noise = torch.linspace(-1.5, 2.0, count, **FLOAT)
    draws["a"] = torch.arange(count)[None] % 3
    draws["z"] = lambda fn: fn.loc + fn.scale * noise
    found = estimate(program, p, x)
    got = torch.autograd.grad(found.surrogate, list(p.values()))
    scale = p["log_scale"].exp()
    z = p["loc"] + scale * noise[:, None]
    log_q = p["address"].log_softmax(-1)
    log_p = (
        log_normal(z, p["entries"], ONE) + log_normal(x[:, None], z, ONE / 2) - torch.tensor(3.0, **FLOAT).log()
    )
    bound = (log_q.exp() * (log_p - log_q - log_normal(z, p["loc"], scale))).sum(-1)
    torch.testing.assert_close(found.value, bound.detach(), rtol=1e-10, atol=1e-10)
    for a, b in zip(got, torch.autograd.grad(bound.sum(), list(p.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_latent_before_the_changed_value_stays(draws):
    """z, then a bit whose probability depends on it: every run has the z of its draw, and q's gradient for z."""
    count = 5
    noise = torch.linspace(-1.0, 1.0, count, **FLOAT)
    draws["z"] = lambda fn: (
        fn.loc + fn.scale * (noise + torch.arange(2.0, **FLOAT)[:, None])
    )  # others' is not used
    loc, slope = (torch.full((count,), v, **FLOAT, requires_grad=True) for v in (0.3, 0.8))

    def model():
        with pyro.plate("data", count):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **FLOAT), 1.0))
            b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.4, **FLOAT)))
            pyro.sample("x", dist.Normal(z * (1 + b), 1.0), obs=torch.ones(count, **FLOAT))

    def guide():
        with pyro.plate("data", count):
            z = pyro.sample("z", dist.Normal(loc, 0.5))
            pyro.sample("b", dist.Bernoulli(logits=slope * z))

    found = MeasureValued(max_plate_nesting=1)._estimate(Programs(model, guide))
    got = torch.autograd.grad(found.surrogate, [loc, slope])
    z = loc + 0.5 * noise
    bound = 0.0
    for b in (0.0, 1.0):
        log_q = torch.nn.functional.logsigmoid(slope * z * (2 * b - 1))
        log_p = log_normal(z, 0 * ONE, ONE) + torch.tensor(0.4 if b else 0.6, **FLOAT).log()
        log_x = log_normal(ONE, z * (1 + b), ONE)
        bound = bound + log_q.exp() * (log_p + log_x - log_q - log_normal(z, loc, ONE / 2))
    torch.testing.assert_close(found.value, bound.detach(), rtol=1e-9, atol=1e-10)
    for a, b in zip(got, torch.autograd.grad(bound.sum(), [loc, slope]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def words(count, inner):
    """A vector of two categorical values in a plate inside the datapoint, with a bit beside it."""
    logits = {
        "a": torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.8, -0.6]], **FLOAT).expand(inner, count, 2, 3),
        "b": torch.tensor(0.4, **FLOAT).expand(count),
    }
    logits = {name: value.clone().requires_grad_() for name, value in logits.items()}

    def program(of):
        def run():
            with pyro.plate("data", count, dim=-1):
                b = pyro.sample("b", dist.Bernoulli(logits=of["b"]))
                with pyro.plate("words", inner, dim=-2):
                    a = pyro.sample("a", dist.Categorical(logits=of["a"]).to_event(1))
                if of is not logits:
                    mean = (a.to(b.dtype) * torch.tensor([1.0, -0.5], **FLOAT)).sum(-1).sum(-2, keepdim=True) * (
                        1 + b
                    )
                    pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(count, **FLOAT))

        return run

    flat = {name: torch.zeros_like(value) for name, value in logits.items()}
    return program(flat), program(logits), logits


def test_elements_of_a_vector_in_an_inner_plate(draws):
    """2 x 2 elements of three values and one bit: over all 162 draws."""
    inner = 2
    outcomes = torch.tensor(list(itertools.product(range(2), *[range(3)] * 4)))  # b, then a [inner, 2]
    count = len(outcomes)
    model, guide, logits = words(count, inner)
    draws["b"] = outcomes[None, :, 0]
    draws["a"] = outcomes[:, 1:].reshape(count, inner, 2).transpose(0, 1)[None]
    log_a = logits["a"].log_softmax(-1)
    log_q = torch.nn.functional.logsigmoid(logits["b"] * (2 * outcomes[:, 0] - 1.0))
    chosen = draws["a"][0]  # [inner, N, 2]
    log_q = log_q + log_a.gather(-1, chosen[..., None]).sum((0, 2, 3))
    mean = (chosen * torch.tensor([1.0, -0.5], **FLOAT)).sum(-1).sum(0) * (1 + outcomes[:, 0])
    log_p = log_normal(ONE, mean, ONE) - torch.tensor(2.0 * 81, **FLOAT).log()
    bound = log_q.exp() * (log_p - log_q)  # each row has parameters of its own
    want = torch.autograd.grad(bound.sum(), list(logits.values()))

    # Where b is changed the words are drawn anew: the same ones here, as their law does not depend on b.
    draws["a"] = draws["a"].expand(2, -1, -1, -1)
    found = MeasureValued(max_plate_nesting=2)._estimate(Programs(model, guide))
    got = torch.autograd.grad(found.surrogate, list(logits.values()))
    weight = log_q.detach().exp()
    assert (weight * found.value).sum().item() == pytest.approx(bound.sum().item(), abs=1e-10)
    for a, b, dims in zip(got, want, ([1], [0]), strict=True):
        shape = [-1 if d in dims else 1 for d in range(a.dim())]
        torch.testing.assert_close((weight.reshape(shape) * a).sum(dims), b.sum(dims), rtol=1e-9, atol=1e-10)


def test_runs_of_the_model_and_noise():
    """1 + D (S - 1) runs for each draw; less noise than as many independent particles."""
    program = Binary(second=True)
    found = {}
    for name, elbo in (
        ("measured", MeasureValued(2, max_plate_nesting=1)),
        ("rloo", RLOO(8, max_plate_nesting=1)),
    ):
        p = rows(program.values, 400)
        assert count_evaluations(elbo, Programs(program.model, program.guide, (p,))) == 8
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(program.model, program.guide, p)
        found[name] = torch.autograd.grad(loss, [p["guide_b"], p["guide_c"]])
    for measured, rloo in zip(found["measured"], found["rloo"], strict=True):
        assert measured.var(0).sum() < rloo.var(0).sum()


def poisson():
    with pyro.plate("data", 2):
        pyro.sample("n", dist.Poisson(torch.ones(2)))


def gaussian():
    with pyro.plate("data", 2):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))


def counts():
    with pyro.plate("data", 2):
        pyro.sample("n", dist.Binomial(torch.tensor([2.0, 3.0]), 0.5 * torch.ones(2)))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (poisson, "^site 'n': expected a finite support to change values in, got Poisson"),
        (gaussian, "^guide: expected a discrete site, whose values are changed, found \\['z'\\]"),
        (counts, "^site 'n': expected a finite support, the same for all elements, got Binomial"),
    ],
)
def test_what_is_refused(program, message):
    with pytest.raises(ValueError, match=message) as error:
        MeasureValued().loss(program, program)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^vectorize_particles: expected True for MeasureValued, got False$"):
        MeasureValued(vectorize_particles=False)


def test_stl_keeps_the_mean():
    """A rule of the latent after the value: the mean over 20,000 datapoints is that of the plain gradient."""
    program, count, found = Mixed(), 20_000, []
    for rule in (None, dreg):
        p, x = rows(program.values, count), program.x.expand(count).clone()

        def guide(p, x, rule=rule):
            with program._plate(x):
                a = pyro.sample("a", dist.Categorical(logits=p["address"]))
                fn = dist.Normal(program.read(p["loc"], a), program.read(p["log_scale"], a).exp())
                pyro.sample("z", fn, infer={} if rule is None else {"estimator": rule})

        torch.manual_seed(0)
        elbo = MeasureValued(max_plate_nesting=1)
        loss = elbo.differentiable_loss(program.model, guide, p, x) / 2  # of half of the data
        found.append(torch.autograd.grad(loss, p["loc"])[0])
    difference = found[0].mean(0) - found[1].mean(0)
    assert (difference.abs() < 4.5 * ((found[0].var(0) + found[1].var(0)) / count).sqrt()).all()
    assert found[0].var(0).sum() != found[1].var(0).sum()
