"""RODEO: exact over all values for any alpha, beta and H, exact draw by draw for additive f, what is refused."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger
from test_coupled import NAMES, objective
from test_rebar import assert_equal, mixed_objective
from torch import nn

from programs import FLOAT, SUBSAMPLING, Binary, Fixed, Mixed, Value, rows
from vma_pyro.infer import RLOO, RODEO
from vma_pyro.infer.engine.programs import Programs


def with_parameters(alpha, beta, K, *, network=None, **options):
    """Some H that is not at its start, and a running mean that is not 0."""
    elbo = RODEO(K, network=network, max_plate_nesting=1, **options)
    control = elbo.control.double()
    generator = torch.Generator().manual_seed(K)
    for parameter in control.network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, **FLOAT)
    control.alpha.data.fill_(alpha)
    control.beta.data.fill_(beta)
    control.mean.fill_(-1.3)
    control.variance.fill_(0.6)
    control.eval()
    return elbo


PARAMETERS = [(0.0, 0.0), (0.8, 0.0), (0.0, -0.7), (-1.3, 0.9)]


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
@pytest.mark.parametrize(
    ("second", "K", "site"), [(False, 2, None), (False, 3, None), (True, 2, None), (True, 2, "b"), (True, 2, "c")]
)
def test_bits_over_all_values(alpha, beta, second, K, site):
    """Two bits, and a second layer: what decides it is not changed; a site that is not named is compared."""
    program = Binary(second=second)
    _, log_q = program.tables(rows(program.values, 1))
    outcome = torch.tensor(list(itertools.product(range(log_q.shape[1]), repeat=K))).T  # [K, O]
    weight = log_q[0].detach().exp()[outcome].prod(0)
    values = {"b": program.bits[outcome // 2 if second else outcome].clone().requires_grad_()}
    if second:
        values["c"] = (outcome % 2).double().requires_grad_()
    p = rows(program.values, outcome.shape[1])
    elbo = with_parameters(alpha, beta, K, site=site)
    estimate = elbo._estimate(Programs(program.model, Fixed(values)(program.guide), (p,)))
    value, want = objective(program, None)
    assert (weight * estimate.value).sum().item() == pytest.approx(value, abs=1e-10)
    gradients = torch.autograd.grad(estimate.surrogate, [p[n] for n in NAMES], allow_unused=True)
    for name, got in zip(NAMES, gradients, strict=True):
        if got is not None:
            torch.testing.assert_close(torch.einsum("o,o...->...", weight, got), want[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
@pytest.mark.parametrize("impossible", [0, 1])
@pytest.mark.parametrize("K", [2, 3])
def test_one_hot_values_over_all_values(alpha, beta, impossible, K):
    program = Value(4 + impossible, impossible=impossible, family=dist.OneHotCategorical)
    outcome = torch.tensor(list(itertools.product(range(4), repeat=K))).T
    weight = program.q[outcome].prod(0)
    values = {"a": nn.functional.one_hot(outcome, program.size).double().requires_grad_()}
    p = rows(program.values, outcome.shape[1])
    elbo = with_parameters(alpha, beta, K)
    estimate = elbo._estimate(Programs(program.model, Fixed(values)(program.guide), (p,)))
    value, want = program.objective()
    assert (weight * estimate.value).sum().item() == pytest.approx(value, abs=1e-10)
    for got, wanted in zip(torch.autograd.grad(estimate.surrogate, list(p.values())), want, strict=True):
        torch.testing.assert_close(torch.einsum("o,os->s", weight, got), wanted, rtol=1e-9, atol=1e-10)


class WithNoise(Messenger):
    """z = loc + scale * eps of given eps, inside the plates."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["value"] = msg["fn"].loc + msg["fn"].scale * self.eps


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
def test_a_continuous_latent_beside_it(alpha, beta, shared):
    """Values are enumerated, and Gauss-Hermite nodes taken for z; with a linear H all is polynomial in it."""
    program, K = Mixed(), 2
    root = math.sqrt(6.0)  # four nodes, exact to degree 7
    nodes = torch.tensor([sign * math.sqrt(3 + other * root) for sign in (-1, 1) for other in (-1, 1)], **FLOAT)
    of_node = torch.tensor([1 / (4 * (3 + other * root)) for other in (-1, 1)] * 2, **FLOAT)
    outcome = torch.tensor(list(itertools.product(range(3), range(3), range(4), range(1 if shared else 4))))
    a, first, second = outcome[:, :2].T, outcome[:, 2], outcome[:, 2 if shared else 3]
    assert of_node.sum().item() == pytest.approx(1, abs=1e-12)
    weight = program.values["address"].softmax(0)[a].prod(0) * of_node[first]
    weight = weight if shared else weight * of_node[second]
    handler = WithNoise(torch.stack([nodes[first], nodes[second]]))
    values = {"a": nn.functional.one_hot(a, 3).double().requires_grad_()}
    p, x = rows(program.values, len(weight)), program.x.expand(len(weight)).clone()
    elbo = with_parameters(alpha, beta, K, network=nn.Linear(2, 2), noise="common" if shared else "independent")
    estimate = elbo._estimate(Programs(program.model, handler(Fixed(values)(program.guide)), (p, x)))
    value, want = mixed_objective(program)
    assert (weight * estimate.value).sum().item() == pytest.approx(value, abs=1e-10)
    gradients = torch.autograd.grad(estimate.surrogate, list(p.values()))
    assert_equal({n: torch.einsum("o,os->s", weight, g) for n, g in zip(p, gradients, strict=True)}, want)


def additive(bits, values):
    """Bits and values in two sites, with f linear in them."""
    generator = torch.Generator().manual_seed(2)
    of_bits = torch.randn(bits, generator=generator, **FLOAT)
    of_values = torch.randn(values, 3, generator=generator, **FLOAT)

    def model(p):
        with pyro.plate("data", len(p["b"])):
            b = pyro.sample("b", dist.Bernoulli(torch.full((bits,), 0.4, **FLOAT)).to_event(1))
            pyro.factor("of_b", (of_bits * b).sum(-1))
            if values:
                a = pyro.sample("a", dist.OneHotCategorical(torch.ones(values, 3, **FLOAT)).to_event(1))
                pyro.factor("of_a", (of_values * a).sum((-2, -1)))

    def guide(p):
        with pyro.plate("data", len(p["b"])):
            pyro.sample("b", dist.Bernoulli(logits=p["b"]).to_event(1))
            if values:
                pyro.sample("a", dist.OneHotCategorical(logits=p["a"]).to_event(1))

    p = {"b": torch.randn(bits, generator=generator, **FLOAT)}
    if values:
        p["a"] = torch.randn(values, 3, generator=generator, **FLOAT)
    return model, guide, p, of_bits, of_values


def on_additive(alpha, beta, K, bits, values):
    """A draw of RODEO at H = the step: its gradient [N, ...] for all logits, f - E f [K, N], and scores."""
    model, guide, start, of_bits, of_values = additive(bits, values)
    elbo = RODEO(K, max_plate_nesting=1)
    elbo.control.alpha.data.fill_(alpha)
    elbo.control.beta.data.fill_(beta)
    p = rows(start, 20)
    torch.manual_seed(0)
    particles, _ = elbo._draw_sites(Programs(model, guide, (p,)))
    drawn = {name: particles.draws[0].nodes[name]["value"].detach() for name in p}
    torch.manual_seed(0)
    got = torch.autograd.grad(elbo.differentiable_loss(model, guide, p), list(p.values()))
    q = {"b": start["b"].sigmoid()} | ({"a": start["a"].softmax(-1)} if values else {})
    of = {"b": of_bits + math.log(0.4 / 0.6) - start["b"]} | (
        {"a": of_values - math.log(3) - q["a"].log()} if values else {}
    )
    scores = {name: drawn[name] - q[name] for name in p}
    centred = sum((of[name] * scores[name]).flatten(2).sum(-1) for name in p)
    return dict(zip(p, got, strict=True)), centred, scores, q, of


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize(("bits", "values"), [(1, 0), (3, 0), (2, 2)])
def test_alpha_of_one_makes_the_mean_of_an_additive_f_the_baseline(bits, values, K):
    """Whatever D, draw by draw."""
    got, centred, scores, *_ = on_additive(1.0, 0.0, K, bits, values)
    for name, gradient in got.items():
        spread = centred.reshape(*centred.shape, *[1] * (scores[name].dim() - 2))
        torch.testing.assert_close(gradient, -(spread * scores[name]).mean(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("K", [2, 4])
def test_one_bit_is_a_critic_whose_expectation_is_summed(K):
    """alpha = beta = 1: the gradient of E f, and what the other particles' f differ from it."""
    got, centred, scores, q, of = on_additive(1.0, 1.0, K, 1, 0)
    exact = q["b"] * (1 - q["b"]) * of["b"]
    others = (centred.sum(0) - centred) / (K - 1)
    torch.testing.assert_close(
        got["b"], -(exact + others[..., None] * scores["b"]).mean(0), rtol=1e-10, atol=1e-10
    )


def test_at_the_start_it_is_leave_one_out():
    """On the same bits, of two layers."""
    program, found = Binary(second=True), []
    torch.manual_seed(0)
    bits = {"b": torch.randint(2, (3, 6, 2)).double(), "c": torch.randint(2, (3, 6)).double()}
    for elbo in (RODEO(3, max_plate_nesting=1), RLOO(3, max_plate_nesting=1)):
        values = {name: value.clone().requires_grad_() for name, value in bits.items()}
        p = rows(program.values, 6)
        loss = elbo.differentiable_loss(program.model, Fixed(values)(program.guide), p)
        found.append([loss, *torch.autograd.grad(loss, list(p.values()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("second", [False, True])
def test_the_control_follows_the_squared_gradient_of_the_draw(second):
    """By central differences on the same noise; in eval mode nothing is learned, and no running mean moves."""
    program, elbo = Binary(second=second), with_parameters(0.7, -0.6, 3)
    if second:
        elbo.sites = ("c",)  # whose logits differ between particles

    def gradient(training=False):
        elbo.control.train(training)
        torch.manual_seed(3)
        p = rows(program.values, 40)
        loss = elbo.differentiable_loss(program.model, program.guide, p)
        loss.backward()
        return p["guide_c" if second else "guide_b"].grad

    def square():
        if not second:
            return (gradient() / SUBSAMPLING).square().sum().item()
        torch.manual_seed(3)
        p = rows(program.values, 40)
        p["guide_c"] = p["guide_c"].detach().expand(3, 40, 4).clone().requires_grad_()  # one for each particle
        elbo.control.eval()
        loss = elbo.differentiable_loss(Apart(program).model, Apart(program).guide, p)
        return (torch.autograd.grad(loss, p["guide_c"])[0] / SUBSAMPLING).square().sum().item()

    buffers = [b.clone() for b in elbo.control.buffers()]
    plain = gradient()
    learned = list(elbo.control.parameters())
    assert all(q.grad is None for q in learned)
    assert all(torch.equal(a, b) for a, b in zip(buffers, elbo.control.buffers(), strict=True))
    assert torch.equal(plain, gradient(training=True))
    assert not torch.equal(buffers[0], elbo.control.mean)
    for buffer, before in zip(elbo.control.buffers(), buffers, strict=True):
        buffer.copy_(before)
    for parameter in learned:
        flat, got = parameter.data.view(-1), parameter.grad.view(-1)
        at, found = flat[0].item(), []
        for step in (1e-5, -1e-5):
            flat[0] = at + step
            found.append(square())
        flat[0] = at
        want = SUBSAMPLING * (found[0] - found[1]) / 2e-5
        assert got[0].item() == pytest.approx(want, rel=1e-5, abs=1e-7)


class Apart(Binary):
    """Reads the logits of the third bit from a table of its own for each particle."""

    def __init__(self, program):
        self.__dict__ = program.__dict__

    def _third(self, p, name, b):
        table = p[name]
        if table.dim() == 2:
            return super()._third(p, name, b)
        table = table.gather(-1, self.row(b)[..., None]).squeeze(-1)
        return pyro.sample("c", dist.Bernoulli(logits=table))


@pytest.mark.parametrize(("noise", "factor"), [("independent", 1.1), ("common", 1.3)])
def test_what_is_learned_lowers_the_variance(noise, factor):
    """150 updates of Adam on 100 datapoints; on 20,000 others RLOO has so many times the variance."""
    program = Mixed()
    torch.manual_seed(0)
    pyro.enable_validation(False)
    elbo = RODEO(2, noise=noise, max_plate_nesting=1)
    module = elbo(program.model, program.guide)
    optimizer = torch.optim.Adam(elbo.control.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        module(rows(program.values, 100), program.x.expand(100).clone()).backward()
        optimizer.step()
    module.eval()
    found = []
    for each in (elbo, RLOO(2, noise=noise, max_plate_nesting=1)):
        p, x = rows(program.values, 20_000), program.x.expand(20_000).clone()
        loss = each.differentiable_loss(program.model, program.guide, p, x)
        found.append(torch.autograd.grad(loss, p["address"])[0].var(0).sum().item())
    assert found[0] < found[1] / factor


def test_the_state_is_kept():
    program, elbo = Mixed(), RODEO(2)
    module = elbo(program.model, program.guide)
    module(rows(program.values, 5), program.x.expand(5).clone())
    again = RODEO(2)
    again(program.model, program.guide).load_state_dict(module.state_dict())
    assert again.control.mean == elbo.control.mean != 0
    assert again.control.known


def counts():
    with pyro.plate("data", 2):
        pyro.sample("a", dist.Poisson(torch.ones(2)))


def by_integer():
    with pyro.plate("data", 2):
        a = pyro.sample("a", dist.Categorical(torch.ones(2, 3)))
        pyro.sample("x", dist.Normal(torch.arange(3.0)[a], 1.0), obs=torch.zeros(2))


def any_value():
    with pyro.plate("data", 2):
        pyro.sample("a", dist.Categorical(torch.ones(2, 3)))


class Narrow(nn.Module):
    def forward(self, seen):
        return seen[..., 0]


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (lambda: RODEO(1), "num_particles: expected at least 2 for RODEO, got 1"),
        (lambda: RODEO(2, vectorize_particles=False), "vectorize_particles: expected True for RODEO, got False"),
        (lambda: RODEO(network="mlp"), "network: expected an nn.Module, got 'mlp'"),
        (lambda: RODEO(noise="shared"), "noise: expected 'independent' or 'common', got 'shared'"),
        (
            lambda: RODEO(2, network=Narrow()).differentiable_loss(any_value, any_value),
            "network: expected output [2, 1, 2, 2], got [2, 1, 2]",
        ),
        (
            lambda: RODEO(2, site="b").differentiable_loss(any_value, any_value),
            "site 'b': expected a discrete site in the guide, found none",
        ),
        (
            lambda: RODEO(2).differentiable_loss(counts, counts),
            "site 'a': expected a Categorical, OneHotCategorical or Bernoulli to relax, got Poisson",
        ),
        (
            lambda: RODEO(2).differentiable_loss(by_integer, any_value),
            "site 'a': expected a program that reads weights [..., S] in the place of integers, as RODEO needs",
        ),
    ],
)
def test_what_is_refused(run, line):
    with pytest.raises(ValueError, match="expected") as error:
        run()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert RODEO(2).loss(by_integer, any_value) > 0  # the value alone needs no gradient


def test_masked_datapoints_teach_nothing():
    """H is not 0 there, but its part is."""
    logits = torch.zeros(3, **FLOAT, requires_grad=True)

    def program(logits, x=None):
        with pyro.plate("data", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            b = pyro.sample("b", dist.Bernoulli(logits=logits))
            if x is not None:
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def model():
        program(torch.full((3,), 0.4, **FLOAT), torch.ones(3, **FLOAT))

    torch.manual_seed(1)
    loss = with_parameters(0.8, 0.9, 3).differentiable_loss(model, lambda: program(logits))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[1] == 0
    assert (gradient[[0, 2]] != 0).all()
