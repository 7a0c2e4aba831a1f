"""What masks and subsampling mean for MultiSampleELBO, datapoint by datapoint.

The program has two discrete sites (the second depends on the first), a subsampled batch plate, a scale on one
site, a datapoint that is masked entirely and one where only the second site is masked. Its gradient over all
outcomes is in test_estimators.py.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from vma_pyro.infer import MultiSampleELBO, loo

K, B, S, T, FULL = 3, 4, 5, 2, 7
SUBSAMPLE = torch.tensor([0, 2, 3, 6])
SCALE = 0.7  # on the second site, as in annealing
LIVE = torch.tensor([True, False, True, True])  # datapoint 1 does not count
LIVE_B = torch.tensor([True, True, False, True])  # nor does the second site of datapoint 2


def parameters():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "prior_a": normal(S),
        "prior_b": normal(S, T),
        "mean": normal(S, T),
        "guide_a": normal(FULL, S),
        "guide_b": normal(FULL, S, T),
    }


DATA = torch.randn(FULL, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def model(p):
    with pyro.plate("data", FULL, subsample=SUBSAMPLE) as rows, poutine.mask(mask=LIVE):
        a = pyro.sample("a", dist.Categorical(logits=p["prior_a"]))
        with poutine.scale(scale=SCALE), poutine.mask(mask=LIVE_B):
            b = pyro.sample("b", dist.Categorical(logits=p["prior_b"][a]))
        pyro.sample("x", dist.Normal(p["mean"][a, b], 1.0), obs=DATA[rows])


def guide(p):
    with pyro.plate("data", FULL, subsample=SUBSAMPLE) as rows, poutine.mask(mask=LIVE):
        a = pyro.sample("a", dist.Categorical(logits=p["guide_a"][rows]))
        with poutine.scale(scale=SCALE), poutine.mask(mask=LIVE_B):
            pyro.sample("b", dist.Categorical(logits=p["guide_b"][rows, a]))


def log_tables(p):
    """log w [B, S, T] and log of the probability of drawing [B, S, T], written without Pyro."""
    guide_a = p["guide_a"][SUBSAMPLE].log_softmax(-1)[:, :, None]
    guide_b = p["guide_b"][SUBSAMPLE].log_softmax(-1)
    x = -0.5 * (DATA[SUBSAMPLE, None, None] - p["mean"]) ** 2 - 0.5 * math.log(2 * math.pi)
    ratio_a = p["prior_a"].log_softmax(-1)[:, None] - guide_a
    ratio_b = SCALE * (p["prior_b"].log_softmax(-1) - guide_b) * LIVE_B[:, None, None]
    return (x + ratio_a + ratio_b) * LIVE[:, None, None], guide_a + guide_b


def loss_at(elbo, p, outcome):
    """The estimator's loss when particle k of datapoint b draws outcome[k, b] = T a + b."""
    trace = poutine.Trace()
    for name, value in (("a", outcome // T), ("b", outcome % T)):
        trace.add_node(name, name=name, type="sample", value=value, infer={}, is_observed=False)
    return elbo.differentiable_loss(model, poutine.replay(guide, trace=trace), p)


def test_a_masked_datapoint_gets_no_gradient():
    p = parameters()
    MultiSampleELBO(K, baseline=loo, max_plate_nesting=1).loss_and_grads(model, guide, p)
    assert p["guide_a"].grad[SUBSAMPLE[1]].abs().max() == 0
    assert p["guide_a"].grad[SUBSAMPLE[2]].abs().max() > 0


def test_subsampling_scale_multiplies_the_bound_outside_the_logarithm():
    p = parameters()
    elbo = MultiSampleELBO(K, max_plate_nesting=1)
    outcome = torch.arange(K * B).reshape(K, B) % (S * T)
    log_w = log_tables(p)[0].flatten(1)
    bound = log_w.gather(1, outcome.T).logsumexp(1) - math.log(K)
    assert loss_at(elbo, p, outcome).item() == pytest.approx(-(FULL / B) * bound.sum().item(), rel=1e-12)
