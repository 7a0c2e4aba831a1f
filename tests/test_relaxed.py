"""Relaxed sites: one-hot as well as integer ones, impossible values, and what cannot be relaxed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import FLOAT, log_normal
from vma_pyro.infer import RelaxedELBO
from vma_pyro.infer.estimators.relaxed import SoftCategorical

X, B = torch.tensor([0.4, -1.0], **FLOAT), 2
PADDED = torch.tensor([0.2, -0.1, -math.inf], **FLOAT)
ENTRIES = torch.tensor([1.0, -0.5, 7.0], **FLOAT)


def programs(family, logits, prior=PADDED):
    def model():
        with pyro.plate("data", B):
            weights = pyro.sample("a", family(logits=prior.expand(B, 3)))
            pyro.sample("x", dist.Normal((weights * ENTRIES).sum(-1), 1.0), obs=X)

    def guide():
        with pyro.plate("data", B):
            pyro.sample("a", family(logits=logits + PADDED))

    return model, guide


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("hard", [False, True])
def test_padding_has_no_part_in_value_and_gradient(family, hard):
    """The bound of the two live values alone, in plain torch, from the same Gumbel draws."""
    logits = torch.zeros(B, 3, **FLOAT, requires_grad=True)
    model, guide = programs(family, logits)
    torch.manual_seed(0)
    elbo = RelaxedELBO(2, site="a", straight_through=hard, max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, guide)
    (got,) = torch.autograd.grad(loss, logits)

    plain = torch.zeros(B, 3, **FLOAT, requires_grad=True)
    torch.manual_seed(0)
    # Without -inf: log q and log p of the padding do not count, as its weight is nothing.
    live = (plain[:, :2] + PADDED[:2]).log_softmax(-1)
    noise = -torch.empty(2, B, 3, **FLOAT).exponential_().log()[..., :2]
    soft = ((live + noise) / 0.5).softmax(-1)
    weights = soft
    if hard:
        weights = torch.nn.functional.one_hot(soft.argmax(-1), 2) - soft.detach() + soft
    log_p = (weights * PADDED[:2].log_softmax(-1)).sum(-1)
    log_x = log_normal(X, (weights * ENTRIES[:2]).sum(-1), torch.tensor(1.0, **FLOAT))
    log_w = log_p + log_x - (weights * live).sum(-1)
    want_loss = -(log_w.logsumexp(0) - math.log(2)).sum()
    (want,) = torch.autograd.grad(want_loss, plain)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-10)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert not got[:, 2].any()


def test_a_value_that_the_model_calls_impossible_is_impossible():
    fn = SoftCategorical(PADDED, 0.5, hard=False)
    assert fn.log_prob(torch.tensor([0.5, 0.25, 0.25], **FLOAT)) == -math.inf
    certain = fn.log_prob(torch.tensor([1.0, 0.0, 0.0], **FLOAT))
    assert certain.item() == pytest.approx(PADDED.log_softmax(-1)[0].item())


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: dist.Categorical(torch.ones(B, 3)).mask(False), "MaskedDistribution; put the mask around it"),
        (lambda: dist.OneHotCategorical(torch.ones(B, 3)).mask(torch.ones(B).bool()), "MaskedDistribution; put"),
        (lambda: dist.Categorical(torch.ones(B, 2, 3)).to_event(1), "Independent"),
        (lambda: dist.Bernoulli(torch.full((B,), 0.5)), "Bernoulli"),
        (lambda: dist.Poisson(torch.ones(B)), "Poisson"),
        (lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), torch.ones(B, 3)), "RelaxedOneHotCategorical"),
    ],
)
def test_what_cannot_be_relaxed(make, got):
    model, _ = programs(dist.Categorical, torch.zeros(B, 3, **FLOAT))

    def guide():
        with pyro.plate("data", B):
            pyro.sample("a", make())

    message = f"^site 'a': expected a Categorical or OneHotCategorical to relax, got {got}"
    with pytest.raises(ValueError, match=message) as error:
        RelaxedELBO(2, site="a", max_plate_nesting=1).loss(model, guide)
    assert "\n" not in str(error.value)
