"""Relaxed sites: one-hot as well as integer ones, impossible values, and what cannot be relaxed."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from programs import FLOAT, log_normal
from vma_pyro.infer import (
    GappedStraightThrough,
    GumbelRao,
    RelaxedELBO,
    gumbel_softmax,
    gumbel_straight_through,
    reinmax,
    straight_through,
)
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
    relaxation = gumbel_straight_through if hard else gumbel_softmax
    elbo = RelaxedELBO(2, site="a", relaxation=relaxation, max_plate_nesting=1)
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
    fn = SoftCategorical(PADDED, 0.5)
    assert fn.log_prob(torch.tensor([0.5, 0.25, 0.25], **FLOAT)) == -math.inf
    certain = fn.log_prob(torch.tensor([1.0, 0.0, 0.0], **FLOAT))
    assert certain.item() == pytest.approx(PADDED.log_softmax(-1)[0].item())


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: dist.Categorical(torch.ones(B, 3)).mask(False), "MaskedDistribution; put the mask around it"),
        (lambda: dist.OneHotCategorical(torch.ones(B, 3)).mask(torch.ones(B).bool()), "MaskedDistribution; put"),
        (lambda: dist.Poisson(torch.ones(B)), "Poisson"),
        (lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), torch.ones(B, 3)), "RelaxedOneHotCategorical"),
    ],
)
def test_what_cannot_be_relaxed(make, got):
    model, _ = programs(dist.Categorical, torch.zeros(B, 3, **FLOAT))

    def guide():
        with pyro.plate("data", B):
            pyro.sample("a", make())

    message = f"^site 'a': expected a Categorical, OneHotCategorical or Bernoulli to relax, got {got}"
    with pytest.raises(ValueError, match=message) as error:
        RelaxedELBO(2, site="a", max_plate_nesting=1).loss(model, guide)
    assert "\n" not in str(error.value)


# The straight-through family against the formulas, for the same draws.

PHI = torch.tensor([0.9, -0.4, 0.3], **FLOAT).log_softmax(0)
G = torch.tensor([0.7, -1.1, 0.4], **FLOAT)


def jacobian(pi):
    return torch.diag(pi) - torch.outer(pi, pi)


def gradient_of(relaxation, *, temperature=1.0, seed=0):
    """The value x that is drawn, and the gradient for phi where that for x is G."""
    phi = PHI.clone().requires_grad_()
    torch.manual_seed(seed)
    x = relaxation(phi, temperature)
    (gradient,) = torch.autograd.grad((x * G).sum(), phi)
    return x.detach(), gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_the_straight_through_family(seed, temperature):
    soft = (PHI / temperature).softmax(0)
    options = {"temperature": temperature, "seed": seed}
    x, got = gradient_of(straight_through, **options)
    assert sorted(x.tolist()) == [0.0, 0.0, 1.0]
    torch.testing.assert_close(got, jacobian(soft) @ G / temperature)
    x, got = gradient_of(reinmax, **options)
    torch.testing.assert_close(got, 2 * jacobian((soft + x) / 2) @ G - jacobian(PHI.exp()) @ G / 2)
    if temperature == 1:  # ZGR, draw by draw
        h = x - PHI.exp()
        torch.testing.assert_close(got, (jacobian(PHI.exp()) @ G + (G @ h) * h) / 2)
    x, got = gradient_of(GappedStraightThrough(0.8), **options)
    top = PHI.max()
    shifted = torch.where(x > 0, top, PHI.clamp(max=top - 0.8))
    torch.testing.assert_close(got, jacobian((shifted / temperature).softmax(0)) @ G / temperature)


def test_gumbel_rao_is_the_mean_of_straight_through_gumbel_given_the_value():
    """Means of 40,000 draws; with little temperature it is near ReinMax's, draw by draw."""
    phi = PHI.expand(40_000, 3).clone().requires_grad_()
    found = []
    for relaxation in (GumbelRao(5), gumbel_straight_through):
        torch.manual_seed(1)
        x = relaxation(phi, 0.5)
        (gradient,) = torch.autograd.grad((x * G).sum(), phi)
        found.append(gradient)
    difference = found[0].mean(0) - found[1].mean(0)
    error = ((found[0].var(0) + found[1].var(0)) / len(phi)).sqrt()
    assert (difference.abs() < 4.5 * error).all()
    assert found[0].var(0).sum() < 0.5 * found[1].var(0).sum()
    x, cold = gradient_of(GumbelRao(200_000), temperature=0.02)
    h = x - PHI.exp()
    torch.testing.assert_close(cold, (jacobian(PHI.exp()) @ G + (G @ h) * h) / 2, rtol=0.1, atol=0.03)


def test_values_are_drawn_as_often_as_q_says():
    for relaxation in (straight_through, reinmax, GumbelRao(2), GappedStraightThrough(), gumbel_straight_through):
        torch.manual_seed(0)
        x = relaxation(PHI.expand(50_000, 3), 0.7)
        torch.testing.assert_close(x.mean(0), PHI.exp(), rtol=0, atol=0.01)
        assert x.sum(-1).sub(1).abs().max() < 1e-9


@pytest.mark.parametrize("relaxation", [straight_through, reinmax, GumbelRao(3), GappedStraightThrough()])
def test_impossible_values_have_no_part_in_the_family(relaxation):
    logits = torch.tensor([0.2, -0.1, -math.inf], **FLOAT).expand(50, 3).clone().requires_grad_()
    x = relaxation(logits.log_softmax(-1), 0.7)
    (gradient,) = torch.autograd.grad((x * G).sum(), logits)
    assert not x[:, 2].any()
    assert gradient[:, :2].isfinite().all()
    assert gradient[:, :2].abs().max() > 0
    assert not gradient[:, 2].any()


def bits_and_values(q_bits, q_value, entries):
    """Two Bernoulli vectors and a vector of categorical values; f is quadratic in them."""

    def model():
        with pyro.plate("data", len(q_bits)):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2, **FLOAT)).to_event(1))
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(2, 3, **FLOAT)).to_event(1))  # [..., 2, 3]
            mean = b @ entries[0, :2] + (a @ entries[1]).sum(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(len(q_bits), **FLOAT))

    def guide():
        with pyro.plate("data", len(q_bits)):
            pyro.sample("b", dist.Bernoulli(logits=q_bits).to_event(1))
            pyro.sample("a", dist.Categorical(logits=q_value).to_event(1))

    return model, guide


def test_reinmax_is_exact_for_a_quadratic_function_of_many_sites():
    """All sites at once, one particle: the mean of 100,000 draws is the gradient of the enumerated bound."""
    count = 100_000
    entries = torch.tensor([[0.8, -0.5, 0.0], [0.6, -0.9, 0.2]], **FLOAT)
    bits = torch.tensor([0.4, -0.7], **FLOAT).expand(count, 2).clone().requires_grad_()
    values = (
        torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.8, -0.6]], **FLOAT).expand(count, 2, 3).clone().requires_grad_()
    )
    model, guide = bits_and_values(bits, values, entries)
    torch.manual_seed(0)
    elbo = RelaxedELBO(1, site=None, relaxation=reinmax, temperature=1.0, max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, guide)
    got = torch.autograd.grad(loss, [bits, values])

    one, table = bits[:1].detach().requires_grad_(), values[:1].detach().requires_grad_()
    log_on = torch.stack([F.logsigmoid(-one), F.logsigmoid(one)], -1)[0]  # [2, 2]
    log_q = table.log_softmax(-1)[0]
    bound = 0.0
    for b0, b1, a0, a1 in itertools.product(range(2), range(2), range(3), range(3)):
        log_of_all = log_on[0, b0] + log_on[1, b1] + log_q[0, a0] + log_q[1, a1]
        mean = b0 * entries[0, 0] + b1 * entries[0, 1] + entries[1, a0] + entries[1, a1]
        log_w = (
            -2 * math.log(2) - 2 * math.log(3) + log_normal(torch.tensor(1.0, **FLOAT), mean, torch.tensor(1.0))
        )
        bound = bound + log_of_all.exp() * (log_w - log_of_all)
    want = torch.autograd.grad(-bound, [one, table])
    for found, wanted in zip(got, want, strict=True):
        error = found.std(0) / math.sqrt(count)
        assert ((found.mean(0) - wanted[0]).abs() < 4.5 * error + 1e-12).all()


def test_what_a_relaxation_must_be():
    with pytest.raises(ValueError, match="^relaxation: expected a function such as gumbel_softmax, got"):
        RelaxedELBO(2, relaxation="reinmax")
    with pytest.raises(ValueError, match="^draws: expected"):
        GumbelRao(0)


def hard_reads():
    """What programs might make of a bit, or of one-hot values, that has no gradient."""
    table = torch.tensor([0.0, 3.0], **FLOAT)
    return {
        "long": (dist.Bernoulli, lambda b: table[b.long()]),
        "bool": (dist.Bernoulli, lambda b: torch.where(b.bool(), 3.0, 0.0)),
        "eq": (dist.Bernoulli, lambda b: torch.where(b == 1, 3.0, 0.0)),
        "gt": (dist.Bernoulli, lambda b: 3 * (b > 0.5).to(table)),
        "round": (dist.Bernoulli, lambda b: 3 * torch.round(b)),
        "to": (dist.Bernoulli, lambda b: table[b.to(torch.int64)]),
        "eq, the other way round": (dist.Bernoulli, lambda b: torch.where(torch.ones_like(b) == b, 3.0, 0.0)),
        "logical_not": (dist.Bernoulli, lambda b: torch.where(torch.logical_not(b), 0.0, 3.0)),
        "max": (dist.OneHotCategorical, lambda w: table[w.max(-1).indices]),
        "topk": (dist.OneHotCategorical, lambda w: table[w.topk(1).indices[..., 0]]),
        "argmax": (dist.OneHotCategorical, lambda w: table[w.argmax(-1)]),
    }


@pytest.mark.parametrize("relaxation", [gumbel_softmax, gumbel_straight_through, reinmax])
@pytest.mark.parametrize("how", hard_reads())
def test_a_program_that_rounds_or_compares_is_refused(how, relaxation):
    """Its gradient would be that of log q alone, and of the wrong sign."""
    family, read = hard_reads()[how]
    shape = (2,) if family is dist.Bernoulli else (2, 2)
    logits = torch.zeros(shape, **FLOAT, requires_grad=True)

    def model():
        with pyro.plate("data", 2):
            b = pyro.sample("b", family(logits=torch.zeros(shape, **FLOAT)))
            pyro.sample("x", dist.Normal(read(b), torch.ones((), **FLOAT)), obs=torch.ones(2, **FLOAT))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("b", family(logits=logits))

    operation = how.split(",")[0]
    message = rf"^site 'b': expected a program that reads its weights as numbers, .* them \({operation}\)$"
    with pytest.raises(ValueError, match=message):  # the loss alone as well
        RelaxedELBO(2, site="b", relaxation=relaxation).loss(model, guide)
    with pytest.raises(ValueError, match=message):
        RelaxedELBO(2, site="b", relaxation=relaxation).differentiable_loss(model, guide)


def test_distributions_may_look_at_weights_themselves():
    """Their validation compares; it is no reading."""
    pyro.enable_validation(True)
    logits = torch.zeros(2, **FLOAT, requires_grad=True)

    def program(observe):
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(logits=logits if not observe else torch.zeros(2, **FLOAT)))
            if observe:
                pyro.sample("x", dist.Bernoulli(probs=b), obs=torch.ones(2, **FLOAT))

    loss = RelaxedELBO(2, site="b").differentiable_loss(lambda: program(True), lambda: program(False))
    assert torch.autograd.grad(loss, logits)[0].abs().min() > 0
