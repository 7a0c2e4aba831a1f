"""Priority sampling: shares without bias over the noise, exact with all values, what the guide follows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import FLOAT, Mixed, Value, rows
from vma_pyro.infer import ExactELBO, PriorityELBO
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.priority import PriorityDraw


@pytest.mark.parametrize("S", [2, 5, 9])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_share_of_each_value_is_its_probability(S, k, monkeypatch):
    """Over u of the value itself, whatever those of the others: it is in or out, and all is constant on both."""
    if k > S:
        pytest.skip("more than there are values")
    torch.manual_seed(S + k)
    log_q = (2 * torch.randn(S, **FLOAT)).log_softmax(0)
    for s in range(S):
        u = torch.rand(20, S, **FLOAT)
        others = (log_q.exp() / u).index_fill(1, torch.tensor([s]), 0.0)
        threshold = others.topk(k, 1).values[:, -1]  # of value s
        edge = (log_q[s].exp() / threshold).clamp(max=1.0)
        found = 0.0
        for middle, length in ((edge / 2, edge), ((edge + 1) / 2, 1 - edge)):
            drawn = PriorityDraw("a", k)
            noise = u.index_copy(1, torch.tensor([s]), middle[:, None]).log()
            monkeypatch.setattr(PriorityDraw, "log_uniform", staticmethod(lambda like, noise=noise: noise))
            values = drawn.values(dist.Categorical(logits=log_q.expand(20, S)))  # [k, 20]
            share = torch.maximum(log_q[s], drawn.log_threshold).exp()
            found = found + length * share * (values == s).any(0)
        torch.testing.assert_close(found, log_q[s].exp().expand(20), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("impossible", [0, 2])
def test_with_all_values_it_is_exact(family, impossible):
    """The bound is log p(x) and its gradient; the guide's is minus that of KL(p(s|x) || q(s))."""
    program = Value(6, family=family, impossible=impossible)
    p = rows(program.values, 3)
    found = PriorityELBO(6, site="a", max_plate_nesting=1)._estimate(Programs(program.model, program.guide, (p,)))
    got = torch.autograd.grad(found.surrogate, list(p.values()))

    plain = rows(program.values, 3)
    log_p = plain["prior"].log_softmax(-1) + dist.Normal(plain["mean"], 1.0).log_prob(torch.tensor(0.4, **FLOAT))
    possible = plain["guide"].isfinite()  # q says that the others do not occur
    evidence = torch.where(possible, log_p, -math.inf).logsumexp(-1)
    torch.testing.assert_close(found.value, evidence.detach(), rtol=1e-10, atol=1e-10)
    posterior = torch.where(possible, log_p, -math.inf).softmax(-1).detach()
    cross = (posterior * torch.where(possible, plain["guide"].log_softmax(-1), 0.0)).sum()
    want = torch.autograd.grad(evidence.sum() + cross, list(plain.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_it_is_a_bound_and_the_guide_is_biased():
    """k of six values, 400,000 datapoints: the mean of the sum is p(x); where the guide's gradient is off."""
    program, count = Value(6), 400_000
    p = rows(program.values, 1)
    exact = ExactELBO(1, site="a", max_plate_nesting=1)
    evidence = exact._estimate(Programs(program.model, program.guide, (p,))).value.item()
    log_p = p["prior"].log_softmax(-1) + dist.Normal(p["mean"], 1.0).log_prob(torch.tensor(0.4, **FLOAT))
    want = log_p.softmax(-1)[0].detach() - program.q
    off = []
    for k in (1, 2, 4):
        torch.manual_seed(k)
        many = rows(program.values, count)
        elbo = PriorityELBO(k, site="a", max_plate_nesting=1)
        found = elbo._estimate(Programs(program.model, program.guide, (many,)))
        ratio = (found.value - evidence).exp()
        assert abs(ratio.mean().item() - 1) < 4.5 * ratio.std().item() / math.sqrt(count)
        assert found.value.mean() < evidence
        (got,) = torch.autograd.grad(found.surrogate, many["guide"])
        off.append(((got.mean(0) - want).norm() / want.norm()).item())
    assert off == pytest.approx([1.1, 0.7, 0.2], abs=0.05)  # as its docstring says


def test_a_gaussian_after_the_value():
    """As many values as there are, with common noise: the same draws as those of the exact sum."""
    program, found = Mixed(), []
    for elbo in (PriorityELBO(3, site="a", noise="common"), ExactELBO(1, site="a", noise="common")):
        p, x = rows(program.values, 4), program.x.expand(4).clone()
        elbo.max_plate_nesting = 1
        torch.manual_seed(0)
        if isinstance(elbo, ExactELBO):
            torch.empty(4, 3, **FLOAT).exponential_()  # the noise of the choice
        found.append(elbo._estimate(Programs(program.model, program.guide, (p, x))).value)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def after_a_latent(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("a", dist.Categorical(logits=z[..., None] * torch.arange(4.0)))
        if x is not None:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_is_refused():
    message = "^site 'a': expected to depend on no continuous latent under PriorityELBO, but the choice of its"
    with pytest.raises(ValueError, match=message) as error:
        PriorityELBO(2, site="a").differentiable_loss(
            lambda: after_a_latent(torch.zeros(3)), lambda: after_a_latent(None)
        )
    assert "\n" not in str(error.value)
    program = Value(3)
    with pytest.raises(ValueError, match="^num_particles: expected at most the 3 values of site 'a', got 4$"):
        PriorityELBO(4, site="a").loss(program.model, program.guide, rows(program.values, 2))
