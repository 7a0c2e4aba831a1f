"""REBAR and RELAX: exact over all values and all noise, for any parameters.

The estimator is a sum of a function of z and one of z given x, so one set of nodes for the noise serves both. Of a
categorical site the weights depend on the ratios of the exponential variables alone. All nodes are those of the
trapezoidal rule on the real line, which converges exponentially for analytic functions.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_coupled import NAMES, objective
from torch import nn

from programs import FLOAT, SUBSAMPLING, Binary, Fixed, Mixed, Value, rows
from vma_pyro.infer import REBAR, RELAX
from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators import conditional_relaxation


class SoftBinary(Binary):
    """Reads its table softly: linear in each bit."""

    def model(self, p):
        index = torch.arange(len(p["mean"]))
        with pyro.plate("data", int(SUBSAMPLING) * len(index), subsample=index):
            b = pyro.sample("b", dist.Bernoulli(logits=p["prior_b"]).to_event(1))
            of_bit = torch.stack([1 - b, b], -1)  # [..., 2, 2]
            weights = (of_bit[..., 0, :, None] * of_bit[..., 1, None, :]).flatten(-2)  # [..., 4]
            mean = (weights * p["mean"][:, :, 0]).sum(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=self.x.expand(len(index)))


class Opinion(nn.Module):
    """A smooth function of z, which is invariant to a shift of the features from `invariant` on."""

    def __init__(self, features, *, invariant=None):
        super().__init__()
        generator = torch.Generator().manual_seed(features)
        weight = 0.6 * torch.randn(features, 3, generator=generator, **FLOAT)
        if invariant is not None:
            weight[invariant:] -= weight[invariant:].mean(0)
        self.weight = nn.Parameter(weight)

    def forward(self, z, *args):
        return torch.tanh(z @ self.weight).sum(-1)


def of_logistic(step=0.4, top=32.0):
    """Nodes and weights of a logistic variable."""
    nodes = torch.arange(-top, top, step, **FLOAT)
    return nodes, step * nodes.sigmoid() * (-nodes).sigmoid()


def of_log_exponential(step=0.3):
    """Nodes and weights of the logarithm of an exponential variable."""
    nodes = torch.arange(-32.0, 5.0, step, **FLOAT)
    return nodes, step * (nodes - nodes.exp()).exp()


def of_ratios(size, step=0.4, top=32.0):
    """Nodes [N, size - 1] and weights of log e_s / e_x for s != x: a multivariate logistic density."""
    line = torch.arange(-top, top, step, **FLOAT)
    nodes = torch.cartesian_prod(*[line] * (size - 1)).reshape(-1, size - 1)
    log_density = math.lgamma(size) + nodes.sum(-1)
    log_density = log_density - size * torch.cat([torch.zeros(len(nodes), 1, **FLOAT), nodes], -1).logsumexp(-1)
    return nodes, step ** (size - 1) * log_density.exp()


def around(x, ratios, size):
    """Log e [N, size] with 0 at x, and the ratios elsewhere."""
    noise = torch.zeros(len(x), size, **FLOAT)
    others = torch.tensor([[s for s in range(size) if s != v] for v in range(size)])[x]
    return noise.scatter(-1, others, ratios)


def with_parameters(elbo, eta=None, temperature=None):
    for part in elbo.learned_parts().values():
        part.double()
    if eta is not None:
        elbo.control.eta.data.fill_(eta)
        elbo.control.log_temperature.data.fill_(math.log(temperature))
    return elbo


def inject(monkeypatch, *per_site):
    """Noise of the sites in their order: for each a tensor of log e [N, ...], or of logistic noise of bits."""
    waiting = itertools.cycle(per_site)

    def log_exponential(like, number):
        noise = next(waiting).expand(like.shape)
        return (noise, torch.zeros_like(noise)) * 2 if number == 4 else (noise, noise)

    monkeypatch.setattr(conditional_relaxation, "log_exponential", log_exponential)


def expected(elbo, program, values, weight, *args):
    """Value and gradient of an estimate, summed over outcomes and nodes."""
    p = rows(program.values, len(weight))
    estimate = elbo._estimate(Programs(program.model, Fixed(values)(program.guide), (p, *args)))
    gradients = torch.autograd.grad(estimate.surrogate, list(p.values()), allow_unused=True)
    mean = {
        name: None if g is None else torch.einsum("o,o...->...", weight, g)
        for name, g in zip(p, gradients, strict=True)
    }
    return (weight * estimate.value).sum().item(), mean


def assert_equal(got, want):
    for name, gradient in got.items():
        if gradient is None:
            assert not want[name].any(), name
        else:
            torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-10, msg=name)


BITS = {
    "rebar": lambda K: with_parameters(REBAR(K, max_plate_nesting=1), 0.7, 0.5),
    "rebar, cold, of the other sign": lambda K: with_parameters(REBAR(K, max_plate_nesting=1), -1.4, 0.3),
    "no control": lambda K: with_parameters(REBAR(K, max_plate_nesting=1), 0.0, 1.3),
    "relax": lambda K: with_parameters(RELAX(K, critic=Opinion(2), max_plate_nesting=1), 0.6, 0.8),
    "a critic alone": lambda K: RELAX(K, critic=Opinion(2), reads_softly=False, max_plate_nesting=1),
}


@pytest.mark.parametrize(("name", "K"), [*((name, 1) for name in BITS), ("rebar", 2)])
def test_bits(name, K, monkeypatch):
    """Two bits: their values are enumerated, the logistic noise of both is integrated."""
    elbo = BITS[name](K)
    program = (Binary if name == "a critic alone" else SoftBinary)(second=False)
    _, log_q = program.tables(rows(program.values, 1))
    outcome = torch.tensor(list(itertools.product(range(4), repeat=K))).T  # [K, O]
    nodes, density = of_logistic(step=0.4 if K == 1 else 0.5, top=28.0)
    noise, density = torch.cartesian_prod(nodes, nodes), torch.outer(density, density).flatten()
    count, N = outcome.shape[1], len(noise)
    assert density.sum().item() == pytest.approx(1, abs=1e-11)
    weight = (log_q[0].detach().exp()[outcome].prod(0)[:, None] * density).flatten()
    inject(monkeypatch, noise.repeat(count, 1))
    b = program.bits[outcome.repeat_interleave(N, 1)]
    value, got = expected(elbo, program, {"b": b}, weight)
    want_value, want = objective(program, None)
    assert value == pytest.approx(want_value, abs=1e-10)
    assert_equal({n: got[n] for n in NAMES if n in got}, want)


VALUES = {
    "rebar": lambda: with_parameters(REBAR(1, max_plate_nesting=1), 0.7, 0.5),
    "rebar, of the other sign": lambda: with_parameters(REBAR(1, max_plate_nesting=1), -1.4, 1.3),
    "relax": lambda: with_parameters(RELAX(1, critic=Opinion(3, invariant=0), max_plate_nesting=1), 0.6, 0.8),
    "a critic alone": lambda: RELAX(1, critic=Opinion(3, invariant=0), reads_softly=False, max_plate_nesting=1),
}


@pytest.mark.parametrize("impossible", [0, 1])
@pytest.mark.parametrize("name", VALUES)
def test_a_categorical_value(name, impossible, monkeypatch):
    """Three values, and one more that cannot be drawn: the two ratios of their noise are integrated."""
    elbo, program = VALUES[name](), Value(3 + impossible, impossible=impossible, family=dist.OneHotCategorical)
    if impossible and isinstance(elbo, RELAX):
        elbo.critic.weight.data = nn.functional.pad(elbo.critic.weight, (0, 0, 0, 1), value=1.0)  # and a 0 there
    ratios, density = of_ratios(3)
    assert density.sum().item() == pytest.approx(1, abs=1e-11)
    outcome = torch.arange(3).repeat_interleave(len(ratios))
    weight = program.q[outcome] * density.repeat(3)
    noise = around(outcome, ratios.repeat(3, 1), 3)
    inject(monkeypatch, torch.cat([noise, torch.zeros(len(noise), impossible, **FLOAT)], -1))
    x = torch.nn.functional.one_hot(outcome, program.size).to(torch.float64)
    value, got = expected(elbo, program, {"a": x[None]}, weight)
    want_value, want = program.objective()
    assert value == pytest.approx(want_value, abs=1e-10)
    assert_equal(got, dict(zip(got, want, strict=True)))


@pytest.mark.parametrize("impossible", [0, 1])
def test_a_critic_of_all_of_z(impossible, monkeypatch):
    """Two values, read as integers: the noise of both is integrated, as the critic is not invariant to a shift."""
    program = Value(2 + impossible, impossible=impossible)
    elbo = RELAX(1, critic=Opinion(2 + impossible), reads_softly=False, max_plate_nesting=1)
    nodes, density = of_log_exponential()
    noise, density = torch.cartesian_prod(nodes, nodes), torch.outer(density, density).flatten()
    assert density.sum().item() == pytest.approx(1, abs=1e-11)
    outcome = torch.arange(2).repeat_interleave(len(noise))
    weight = program.q[outcome] * density.repeat(2)
    inject(monkeypatch, nn.functional.pad(noise.repeat(2, 1), (0, impossible)))
    value, got = expected(elbo, program, {"a": outcome[None]}, weight)
    want_value, want = program.objective()
    assert value == pytest.approx(want_value, abs=1e-10)
    assert_equal(got, dict(zip(got, want, strict=True)))


def mixed_objective(program):
    """The one-sample bound of `Mixed` and its gradient; a quadratic function of z has its mean at two nodes."""
    p = rows(program.values, 1)
    value = 0.0
    for a, eps in itertools.product(range(program.size), (-1.0, 1.0)):
        scale = p["log_scale"][:, a].exp()
        z = p["loc"][:, a] + scale * eps
        log_w = -math.log(program.size) + dist.Normal(p["entries"][:, a], 1.0).log_prob(z)
        log_w = log_w + dist.Normal(z, 0.5).log_prob(program.x) - dist.Normal(p["loc"][:, a], scale).log_prob(z)
        log_q = p["address"].log_softmax(-1)[:, a]
        value = value + log_q.exp() / 2 * (log_w - log_q)
    return value.item(), dict(
        zip(p, (g[0] for g in torch.autograd.grad(value.sum(), list(p.values()))), strict=True)
    )


@pytest.mark.parametrize("name", VALUES)
def test_a_continuous_latent_beside_it(name, monkeypatch):
    """z after the value: Gauss-Hermite nodes for its noise, which f, c(z) and c(z given x) share."""
    elbo, program = VALUES[name](), Mixed()
    ratios, density = of_ratios(3, step=0.5, top=30.0)
    N = len(ratios)
    signs = torch.tensor([-1.0, 1.0], **FLOAT)  # Gauss-Hermite nodes, exact to degree 3
    outcome, eps = (t.repeat_interleave(N) for t in torch.cartesian_prod(torch.arange(3.0, **FLOAT), signs).T)
    outcome = outcome.long()
    weight = program.values["address"].softmax(0)[outcome] * density.repeat(6) / 2
    inject(monkeypatch, around(outcome, ratios.repeat(6, 1), 3))
    monkeypatch.setattr(handlers, "_base_noise", lambda fn: eps[None])
    if name == "a critic alone":  # which runs no handler: the noise of z itself
        monkeypatch.setattr(dist.Normal, "rsample", lambda fn, shape=(): fn.loc + fn.scale * eps)
    x = program.x.expand(len(weight)).clone()
    value, got = expected(elbo, program, {"a": outcome[None]}, weight, x)
    want_value, want = mixed_objective(program)
    assert value == pytest.approx(want_value, abs=1e-10)
    assert_equal(got, want)


class Two:
    """A bit and a value of two, in two sites, for which the mean is linear in each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        shape = {"table": (2, 2), "of_bit": (), "of_value": (2,)}
        self.values = {n: torch.randn(s, generator=generator, **FLOAT) for n, s in shape.items()}

    def model(self, p):
        with pyro.plate("data", len(p["table"])):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, **FLOAT)))
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.6, 0.4], **FLOAT)))
            a = a if a.is_floating_point() else nn.functional.one_hot(a, 2)
            mean = (torch.stack([1 - b, b], -1)[..., None] * a[..., None, :] * p["table"]).sum((-2, -1))
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.full((len(p["table"]),), 0.4, **FLOAT))

    def guide(self, p):
        with pyro.plate("data", len(p["table"])):
            pyro.sample("b", dist.Bernoulli(logits=p["of_bit"]))
            pyro.sample("a", dist.Categorical(logits=p["of_value"]))

    def objective(self):
        p = rows(self.values, 1)
        value = 0.0
        for b, a in itertools.product(range(2), range(2)):
            log_q = dist.Bernoulli(logits=p["of_bit"]).log_prob(torch.tensor(float(b), **FLOAT))
            log_q = log_q + p["of_value"].log_softmax(-1)[:, a]
            log_p = math.log((0.7, 0.3)[b]) + math.log((0.6, 0.4)[a])
            log_x = dist.Normal(p["table"][:, b, a], 1.0).log_prob(torch.tensor(0.4, **FLOAT))
            value = value + log_q.exp() * (log_p + log_x - log_q)
        gradients = torch.autograd.grad(value.sum(), list(p.values()))
        return value.item(), dict(zip(p, (g[0] for g in gradients), strict=True))


@pytest.mark.parametrize("critic", [None, Opinion(3, invariant=1)])
def test_two_sites_together(critic, monkeypatch):
    """The noise of the bit, and the ratio of that of both values."""
    options = {"max_plate_nesting": 1, "site": ("a", "b")}
    elbo = REBAR(1, **options) if critic is None else RELAX(1, critic=critic, **options)
    with_parameters(elbo, 0.8, 0.7)
    (logistic, of_logit), (ratio, of_ratio) = of_logistic(), of_ratios(2)
    noise, density = torch.cartesian_prod(logistic, ratio[:, 0]), torch.outer(of_logit, of_ratio).flatten()
    b, a = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat_interleave(len(noise), 0).T
    program = Two()
    q_b, q_a = program.values["of_bit"].sigmoid(), program.values["of_value"].softmax(0)
    weight = torch.where(b == 1, q_b, 1 - q_b) * q_a[a] * density.repeat(4)
    inject(monkeypatch, noise[:, 0].repeat(4), around(a, noise[:, 1:].repeat(4, 1), 2))
    value, got = expected(elbo, program, {"b": b[None].double(), "a": a[None]}, weight)
    want_value, want = program.objective()
    assert value == pytest.approx(want_value, abs=1e-10)
    assert_equal(got, want)
