"""Flows as q(z): those that remember their draws, have no inverse, or keep their parameters out of sight."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.distributions import TorchDistribution
from torch import nn
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, Transform

from vma_pyro.infer import MultiSampleELBO, ThermodynamicELBO, WakeWake, dreg, iwae, stl

B, K = 6, 5
X = torch.linspace(-1, 2, B)
HELD_FIXED = {
    "wake-wake": lambda: WakeWake(K, max_plate_nesting=1),
    "one by one": lambda: WakeWake(K, max_plate_nesting=1, vectorize_particles=False),
    "half asleep": lambda: WakeWake(K, insomnia=0.5, max_plate_nesting=1),
    "tvo": lambda: ThermodynamicELBO(K, max_plate_nesting=1),
}


def model(x, size=1):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(1.3 * z.sum(-1), 0.7), obs=x)


class Affine(nn.Module):
    """loc + scale * noise, as a Normal or as a flow with or without a cache; or its exponential's logarithm."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.loc, self.log_scale = nn.Parameter(torch.full((B, 1), 0.3)), nn.Parameter(torch.full((B, 1), -0.2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.how == "normal":
                q = dist.Normal(self.loc, self.log_scale.exp())
            else:
                parts = [AffineTransform(self.loc, self.log_scale.exp(), cache_size=int("cache" in self.how))]
                if "chain" in self.how:  # and back through a pair that cancels, each with a cache of its own
                    double = AffineTransform(0.0, torch.tensor(2.0), cache_size=1)
                    parts += [double, AffineTransform(0.0, torch.tensor(0.5), cache_size=1)]
                q = dist.TransformedDistribution(dist.Normal(torch.zeros(B, 1), torch.ones(B, 1)), parts)
            pyro.sample("z", q.to_event(1))


def gradients(guide, elbo):
    torch.manual_seed(1)
    elbo.differentiable_loss(model, guide, X).backward()
    return [p.grad for p in guide.parameters()]


@pytest.mark.parametrize("how", ["flow", "flow with a cache", "chain with a cache"])
@pytest.mark.parametrize("name", HELD_FIXED)
def test_a_flow_learns_what_the_same_normal_learns(name, how):
    """On the same noise; a flow that remembers its draws would have no gradient at all."""
    want, got = (gradients(Affine(h), HELD_FIXED[name]()) for h in ("normal", how))
    assert all(g.abs().max() > 0.01 for g in want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make_flow", [lambda: T.affine_autoregressive(2, [8]), lambda: T.spline(2)])
def test_pyros_flows_under_wake_wake(make_flow):
    """Against sum (v_k - 1/K) grad log q(z_k) at the same draws, inverted by a copy that remembers nothing."""
    torch.manual_seed(0)
    flow, seen = make_flow(), []

    def q():
        return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow])

    def guide(x):
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("z", q().expand([len(x)])))

    model(X, 2)
    loss = WakeWake(K, max_plate_nesting=1).differentiable_loss(lambda x: model(x, 2), guide, X)
    got = torch.autograd.grad(loss, list(flow.parameters()))
    z = seen[-1].detach().clone()  # [K, B, 2]
    log_q = q().log_prob(z)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(1.3 * z.sum(-1), 0.7).log_prob(X)
    v = (log_p - log_q).detach().softmax(0)
    want = torch.autograd.grad(-((v - 1 / K) * log_q).sum(), list(flow.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make_flow", [lambda: T.planar(2), lambda: T.radial(2)])
@pytest.mark.parametrize("elbo", [*HELD_FIXED.values(), lambda: MultiSampleELBO(K, pathwise=dreg)])
def test_a_flow_without_an_inverse_is_refused_by_name(elbo, make_flow):
    flow = make_flow()

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]).expand([len(x)]))

    with pytest.raises(ValueError, match="site 'z': expected a density at any value") as error:
        elbo().differentiable_loss(lambda x: model(x, 2), guide, X)
    assert "\n" not in str(error.value)


def test_a_planar_site_after_a_site_under_dreg():
    """It does not depend on that site: no KeyError, and the plain rule serves it."""
    flow, loc = T.planar(2), torch.zeros(B, requires_grad=True)

    def pair(x, of_guide):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(loc if of_guide else torch.zeros(B), 1.0))
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            fn = dist.TransformedDistribution(base, [flow]).expand([len(x)]) if of_guide else base
            z = pyro.sample("z", fn, infer={"estimator": iwae} if of_guide else {})
            if not of_guide:
                pyro.sample("x", dist.Normal(y + z.sum(-1), 0.7), obs=x)

    elbo = MultiSampleELBO(K, pathwise=dreg, max_plate_nesting=1)
    loss = elbo.differentiable_loss(lambda x: pair(x, False), lambda x: pair(x, True), X)
    gradient = torch.autograd.grad(loss, [loc, *flow.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradient)


class Hidden(Transform):
    """y = exp(w) x, with w reached through a function."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, log_factor):
        super().__init__()
        self.log_factor = log_factor

    def _call(self, x):
        return self.log_factor().exp() * x

    def _inverse(self, y):
        return y / self.log_factor().exp()

    def log_abs_det_jacobian(self, x, y):
        return self.log_factor().expand(x.shape)


class HiddenNormal(TorchDistribution):
    """A Normal whose scale is reached through a function."""

    has_rsample = True

    def __init__(self, shape, log_scale):
        self.log_scale = log_scale
        super().__init__(shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return HiddenNormal(torch.Size(batch_shape), self.log_scale)

    def rsample(self, sample_shape=()):
        return self.log_scale().exp() * torch.randn(*sample_shape, *self.batch_shape)

    def log_prob(self, value):
        w = self.log_scale()
        return -0.5 * (value / w.exp()) ** 2 - w - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("rule", [dreg, stl])
@pytest.mark.parametrize("kind", ["flow", "distribution"])
def test_parameters_in_a_closure_cannot_be_held_fixed(rule, kind):
    w = torch.tensor(0.7, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            if kind == "flow":
                base = dist.Normal(torch.zeros(len(x), 1), 1.0)
                pyro.sample("z", dist.TransformedDistribution(base, [Hidden(lambda: w)]).to_event(1))
            else:
                pyro.sample("z", HiddenNormal(torch.Size((len(x), 1)), lambda: w).to_event(1))

    with pytest.raises(ValueError, match="site 'z': expected a log q whose parameters can be held fixed") as error:
        MultiSampleELBO(K, pathwise=rule, max_plate_nesting=1).differentiable_loss(model, guide, X)
    assert "\n" not in str(error.value)
    loss = MultiSampleELBO(K, max_plate_nesting=1).differentiable_loss(model, guide, X)
    assert torch.autograd.grad(loss, w)[0].abs() > 0


class Shifted(torch.distributions.Normal):
    """A class derived from a Normal that draws otherwise: no location-scale family any more."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).abs()


@pytest.mark.parametrize("fn", [dist.StudentT(3.0, torch.zeros(B), 1.0), Shifted(torch.zeros(B), 1.0)])
def test_common_noise_is_for_noise_without_parameters(fn):
    """A StudentT's degrees of freedom are its noise's: a shared draw is right for one of two particles at most."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn if hasattr(fn, "mask") else _as_pyro(fn))

    def flat(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("y", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'y': expected a location-scale family for common noise"):
        MultiSampleELBO(2, noise="common", max_plate_nesting=1).loss(flat, guide, X)


def _as_pyro(fn):
    class Mixed(type(fn), dist.torch_distribution.TorchDistributionMixin):
        pass

    return Mixed(fn.loc, fn.scale)
