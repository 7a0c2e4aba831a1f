"""A site of thousands and of a million values, in float32 with validation on: logits all the way."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import CATEGORICAL, SOFT
from vma_pyro.infer import make

B, MANY = 2, 20_000
# Runs of the model for every value, and tables of pairs of values, are for fewer of them.
FEW = {"measure-valued", "measure-valued+common", "exact", "pyro-enum", "carms"}


def programs(size, family=dist.Categorical):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(size, generator=generator)
    logits = (3 * torch.randn(B, size, generator=generator)).requires_grad_()
    prior = torch.randn(size, generator=generator)

    def model(x):
        with pyro.plate("data", B):
            a = pyro.sample("a", family(logits=prior))
            mean = (a * means).sum(-1) if a.is_floating_point() else means[a]
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("a", family(logits=logits))

    return model, guide, logits


@pytest.mark.parametrize("size", [5_000, 1_000_000])
@pytest.mark.parametrize("name", sorted({*CATEGORICAL} - FEW))
def test_probabilities_are_never_checked_to_sum_to_one(name, size):
    """Their sum is off by more than Torch allows, here and there: every estimator keeps to logits."""
    pyro.enable_validation(True)
    torch.manual_seed(0)
    model, guide, logits = programs(size)
    x = torch.zeros(B)
    loss = make(name, 2, site="a").differentiable_loss(model, guide, x)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["unordered-set", "sum-and-sample", "rloo"])
def test_the_bound_of_many_values(name):
    """The mean over draws is the bound, summed in float64: within 4.5 standard errors of 200 draws."""
    model, guide, logits = programs(MANY)
    log_q = logits.detach().double().log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(MANY, generator=generator).double()
    torch.randn(B, MANY, generator=generator)
    log_p = torch.randn(MANY, generator=generator).double().log_softmax(-1)
    log_w = log_p - 0.5 * means**2 - 0.5 * math.log(2 * math.pi) - log_q
    bound = (log_q.exp() * log_w).sum().item()
    elbo = make(name, 4, site="a")
    torch.manual_seed(0)
    found = torch.tensor([-elbo.loss(model, guide, torch.zeros(B)) for _ in range(200)])
    assert abs(found.mean().item() - bound) < 4.5 * found.std().item() / math.sqrt(200)


def test_one_hot_values():
    pyro.enable_validation(True)
    model, guide, logits = programs(5_000, dist.OneHotCategorical)
    for name in ("vimco", "rloo", "disarm-tree", *SOFT):
        loss = make(name, 2, site="a").differentiable_loss(model, guide, torch.zeros(B))
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()
