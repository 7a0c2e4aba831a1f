"""MultiSampleELBO on a program with a categorical address and a Gaussian, against a Rao-Blackwellised reference.

The reference sums all S^K addresses exactly and reparameterises z; both are averaged over many noise draws and
compared component by component: |z| < 4 with 75 trials of 240 datapoints each.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from vma_pyro.infer import MultiSampleELBO, loo, reinforce, vimco, vimco_geometric

K, B, S = 2, 240, 3
TRIALS = 75
FULL = 360  # two thirds of the data are in the subsample


def parameters():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "entries": normal(S),
        "address": normal(S),
        "loc": normal(S),
        "log_scale": normal(S),
    }


X = torch.tensor(0.7, dtype=torch.float64)
MASK = (torch.arange(B) % 3 != 0).double()  # every third datapoint does not count


def model(p):
    with pyro.plate("data", FULL, subsample=torch.arange(B)), poutine.mask(mask=MASK.bool()):
        a = pyro.sample("address", dist.Categorical(logits=torch.zeros(S, dtype=torch.float64)))
        z = pyro.sample("z", dist.Normal(p["entries"][a], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X.expand(B))


def guide(p):
    with pyro.plate("data", FULL, subsample=torch.arange(B)), poutine.mask(mask=MASK.bool()):
        a = pyro.sample("address", dist.Categorical(logits=p["address"]))
        pyro.sample("z", dist.Normal(p["loc"][a], p["log_scale"][a].exp()))


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)


def reference_loss(p):
    """The addresses summed exactly, z sampled anew for each outcome."""
    log_q = p["address"].log_softmax(-1)
    loss = 0.0
    for outcome in itertools.product(range(S), repeat=K):
        a = torch.tensor(outcome)[:, None].expand(K, B)
        scale = p["log_scale"][a].exp()
        z = p["loc"][a] + scale * torch.randn(K, B, dtype=torch.float64)
        log_w = -math.log(S) + log_normal(z, p["entries"][a], 1.0) + log_normal(X, z, torch.tensor(0.5))
        log_w = log_w - log_q[a] - log_normal(z, p["loc"][a], scale)
        bound = (log_w.logsumexp(0) - math.log(K)) * MASK
        loss = loss - (FULL / B) * (log_q[a].sum(0).exp() * bound).sum()
    return loss


def gradients(loss, p):
    """TRIALS gradients, each of all parameters in one row."""
    rows = [torch.cat(torch.autograd.grad(loss(), list(p.values()))) for _ in range(TRIALS)]
    return torch.stack(rows)


def z_scores(a, b):
    """Of the difference of two means."""
    return (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / TRIALS).sqrt()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(1)
    p = parameters()
    return gradients(lambda: reference_loss(p), p)


@pytest.mark.parametrize("baseline", [reinforce, vimco, vimco_geometric, loo])
@pytest.mark.parametrize("vectorize", [True, False])
def test_gradient_is_unbiased(baseline, vectorize, reference):
    p = parameters()
    elbo = MultiSampleELBO(K, baseline=baseline, max_plate_nesting=1, vectorize_particles=vectorize)
    pyro.enable_validation(False)
    scores = z_scores(gradients(lambda: elbo.differentiable_loss(model, guide, p), p), reference)
    assert scores.abs().max() < 4, scores


def test_the_comparison_has_power(reference):
    """Without the score part the address gets another gradient, and the z-scores say so."""
    p = parameters()

    def pathwise_only():
        # c_k = L removes the score part altogether.
        elbo = MultiSampleELBO(
            K, baseline=lambda w: (w.logsumexp(0) - math.log(K)).expand(K, -1), max_plate_nesting=1
        )
        return elbo.differentiable_loss(model, guide, p)

    scores = z_scores(gradients(pathwise_only, p), reference)
    assert scores[S : 2 * S].abs().max() > 10
