"""Estimators with coupled particles: expectations over all their noise, in float64, against enumerated objectives.

The noise of a coupling is summed piece by piece: where an estimator is linear in it, at the middle of each piece.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import FLOAT, SUBSAMPLING, Binary, Fixed, rows
from vma_pyro.infer import (
    ARM,
    ARMS,
    CARMS,
    RLOO,
    DisARM,
    DisARMTree,
    LocalARMS,
    LocalDisARM,
    MultiSampleELBO,
    dreg,
    stl,
)
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators import arm, arms, disarm

NAMES = ("prior_b", "prior_c", "mean", "guide_b", "guide_c")


def objective(program, K):
    """The one-sample (K = None) or K-sample bound, enumerated, and its gradient."""
    p = rows(program.values, 1)
    log_w, log_q = program.tables(p)
    if K is None:
        value = (log_q.exp() * log_w).sum()
    else:
        outcomes = torch.tensor(list(itertools.product(range(log_w.shape[1]), repeat=K)))
        bounds = log_w[:, outcomes].logsumexp(-1) - math.log(K)
        value = (log_q[:, outcomes].sum(-1).exp() * bounds).sum()
    gradients = torch.autograd.grad(value, [p[n] for n in NAMES], allow_unused=True)
    return value.item(), {
        n: torch.zeros_like(program.values[n]) if g is None else g[0]
        for n, g in zip(NAMES, gradients, strict=True)
    }


# Noise: a list of (what particles see at each bit [N, bits], probability).


def pieces(theta):
    """The intervals of u on which b and b' are constant, by their middle and length."""
    ends = sorted({0.0, theta, 1 - theta, 1.0})
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(ends)]


def joined(per_bit):
    """All combinations of what is independent from bit to bit: values [N, bits] and probability."""
    return [
        (
            torch.tensor([part[0] for part in parts], **FLOAT).reshape(len(parts), -1).T,
            math.prod(p for _, p in parts),
        )
        for parts in itertools.product(*per_bit)
    ]


def together(*noises):
    """All combinations of what is independent from pair to pair."""
    return [
        (torch.cat([values for values, _ in parts]), math.prod(p for _, p in parts))
        for parts in itertools.product(*noises)
    ]


def antithetic(program, pairs):
    one = joined([pieces(t.item()) for t in program.values["guide_b"].sigmoid()])
    return together(*[one] * pairs)


def copula(program, K):
    """What of the uniforms of the Dirichlet copula is small: by P(all of m are) = (1 - m (1 - t))_+^(K-1)."""
    per_bit = []
    for theta in program.values["guide_b"].sigmoid():
        t = min(theta.item(), 1 - theta.item()) ** (1 / (K - 1))
        small = [max(0.0, 1 - m * (1 - t)) ** (K - 1) for m in range(K + 1)]
        found = []
        for pattern in itertools.product([0.0, 1.0], repeat=K):
            m, rest = pattern.count(0.0), pattern.count(1.0)
            p = sum((-1) ** j * math.comb(rest, j) * small[m + j] for j in range(rest + 1))
            if p > 1e-14:
                found.append((pattern, p))
        per_bit.append(found)
    return joined(per_bit)


def independent(program, number):
    """Draws of each particle alone."""
    per_bit = [[(0.0, 1 - t.item()), (1.0, t.item())] for t in program.values["guide_b"].sigmoid()]
    return together(*[joined(per_bit)] * number)


def expected(elbo, program, noise, alone, particles, monkeypatch):
    """Value and gradient of an estimator, summed over coupled noise, independent draws, and third bits."""
    thirds = list(itertools.product([0.0, 1.0], repeat=particles)) if program.second else [()]
    outcomes = list(itertools.product(noise, alone, thirds))
    p = rows(program.values, len(outcomes))
    weight = torch.tensor([n[1] * a[1] for n, a, _ in outcomes], **FLOAT)
    seen = torch.stack([n[0] for n, _, _ in outcomes], 1)  # [N, O, bits]
    for module, name in ((disarm, "uniform"), (arm, "uniform"), (arms, "copula")):
        monkeypatch.setattr(module, name, lambda number, like: seen)
    own = torch.stack([a[0] for _, a, _ in outcomes], 1)  # [number, O, bits]
    monkeypatch.setattr(dist.Bernoulli, "sample", lambda self, shape=(): own if shape else own[0])
    third = {"c": torch.tensor([c for _, _, c in outcomes], **FLOAT).T} if program.second else {}
    drawn = []
    draw = type(elbo)._draw

    def remembered(self, *args, **options):
        drawn.append(draw(self, *args, **options))
        return drawn[-1]

    monkeypatch.setattr(type(elbo), "_draw", remembered)
    estimate = elbo._estimate(Programs(program.model, Fixed(third)(program.guide), (p,)))
    for score in drawn[0].scores:  # the third bits depend on what came before
        if score.name == "c":
            weight = weight * score.log_prob.detach().sum(0).exp()
    assert estimate.scale == SUBSAMPLING
    assert weight.sum().item() == pytest.approx(1.0)
    gradients = torch.autograd.grad(estimate.surrogate, [p[n] for n in NAMES], allow_unused=True)
    return (weight * estimate.value).sum().item(), {
        n: torch.zeros_like(program.values[n]) if g is None else torch.einsum("o,o...->...", weight, g)
        for n, g in zip(NAMES, gradients, strict=True)
    }


NOTHING = [(torch.zeros(1, 2, **FLOAT), 1.0)]
CASES = {
    "arm": (ARM(2), None, lambda b: antithetic(b, 1), None, 2),
    "disarm": (DisARM(2), None, lambda b: antithetic(b, 1), None, 2),
    "disarm, one alone": (DisARM(3), None, lambda b: antithetic(b, 1), 1, 3),
    "disarm, two pairs": (DisARM(4), None, lambda b: antithetic(b, 2), None, 4),
    "arm, two pairs": (ARM(4), None, lambda b: antithetic(b, 2), None, 4),
    "arms of 2": (ARMS(2), None, lambda b: copula(b, 2), None, 2),
    "arms of 3": (ARMS(3), None, lambda b: copula(b, 3), None, 3),
    "arms of 4": (ARMS(4), None, lambda b: copula(b, 4), None, 4),
    "local disarm, K = 1": (LocalDisARM(1), 1, lambda b: antithetic(b, 1), None, 2),
    "local disarm, K = 2": (LocalDisARM(2), 2, lambda b: antithetic(b, 2), None, 4),
    "local arms": (LocalARMS(2), 2, lambda b: copula(b, 2), 2, 4),
    "local arms of 3": (LocalARMS(2, candidates=3), 2, lambda b: copula(b, 3), 2, 5),
    "local arms, K = 3": (LocalARMS(3), 3, lambda b: copula(b, 2), 3, 5),
}


# With a third bit of each particle, five have too many outcomes.
EACH = [(name, second) for name in CASES for second in (False, True) if not second or CASES[name][-1] < 5]


@pytest.mark.parametrize(("name", "second"), EACH)
def test_binary_values_over_all_noise(name, second, monkeypatch):
    """Two bits that are coupled and, with `second`, a third which depends on them and is not."""
    elbo, K, noise, alone, particles = CASES[name]
    program = Binary(second=second)
    others = NOTHING if alone is None else independent(program, alone)
    value, gradients = expected(elbo, program, noise(program), others, particles, monkeypatch)
    want_value, want = objective(program, K)
    assert value == pytest.approx(want_value, abs=1e-10)
    for parameter in NAMES:
        torch.testing.assert_close(gradients[parameter], want[parameter], rtol=1e-9, atol=1e-10)
    assert want["guide_b"].abs().min() > 1e-3


def test_nearly_certain_bits_in_float32():
    """The weight of unequal values is a difference of two that are nearly the same, for bits like these."""
    logits = torch.tensor([-30.0, -12.0, -5.0, 0.0, 5.0, 12.0, 30.0])
    for K in (2, 3, 5, 12):
        single, double = (arms.weight_of_unequal(part, K) for part in (logits, logits.double()))
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=0)
        assert double.min() > 0.1
        torch.testing.assert_close(double, double.flip(0))
    torch.testing.assert_close(arms.weight_of_unequal(logits.double(), 2), logits.double().abs().sigmoid())


def variances(kinds, *, layers):
    """Sum over parameters of the variance of gradients, each of 4,000 draws."""
    program, found = Binary(second=layers), []
    for elbo in kinds:
        torch.manual_seed(0)
        p = rows(program.values, 4000)
        estimate = elbo._estimate(Programs(program.model, program.guide, (p,)))
        (gradient,) = torch.autograd.grad(estimate.surrogate, [p["guide_b"]])
        found.append(gradient.var(0).sum().item())
    return found


def test_less_noise_than_before():
    """As the papers say: DisARM below ARM and independent pairs, for bits alone and for bits under others."""
    for layers in (False, True):
        of_arm, of_disarm, independent_pairs = variances([ARM(2), DisARM(2), RLOO(2)], layers=layers)
        assert of_disarm < 0.95 * min(of_arm, independent_pairs), layers


class InAPlate:
    """Bits in a plate inside the datapoint, beside a Gaussian and a categorical site; parameters for each."""

    def __init__(self, count):
        self.logits = torch.tensor([[0.5, -1.0, 0.2]], **FLOAT).expand(count, 3).clone().requires_grad_()
        self.loc = torch.zeros(count, 1, **FLOAT, requires_grad=True)
        self.count = count

    def model(self):
        with pyro.plate("data", self.count, dim=-2):
            with pyro.plate("pixels", 3, dim=-1):
                b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.5, **FLOAT)))
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(2, **FLOAT)))
            z = pyro.sample("z", dist.Normal(b.sum(-1, keepdim=True) + c, torch.ones((), **FLOAT)))
            x = torch.full((self.count, 1), 1.5, **FLOAT)
            pyro.sample("x", dist.Normal(z, torch.ones((), **FLOAT)), obs=x)

    def guide(self):
        with pyro.plate("data", self.count, dim=-2):
            with pyro.plate("pixels", 3, dim=-1):
                b = pyro.sample("b", dist.Bernoulli(logits=self.logits))
            pyro.sample("c", dist.Categorical(logits=torch.tensor([0.3, -0.2], **FLOAT)))
            pyro.sample("z", dist.Normal(self.loc + b.sum(-1, keepdim=True), torch.ones((), **FLOAT)))


@pytest.mark.parametrize("kind", [ARM, DisARM, ARMS])
def test_bits_in_a_plate_beside_sites_of_other_kinds(kind):
    """60,000 draws beside as many of leave-one-out: within 4.5 standard errors."""
    means, errors = [], []
    for elbo in (kind(4), RLOO(4)):
        torch.manual_seed(0)
        program = InAPlate(60_000)
        loss = elbo.differentiable_loss(program.model, program.guide)
        gradients = torch.cat(torch.autograd.grad(loss, [program.logits, program.loc]), 1)
        means.append(gradients.mean(0))
        errors.append(gradients.var(0) / len(gradients))
    assert ((means[0] - means[1]).abs() < 4.5 * sum(errors).sqrt()).all()
    assert means[0].abs().max() > 0.05


def one_site(family, argument):
    def guide():
        with pyro.plate("data", 2):
            pyro.sample("b", family(argument))

    return guide


def masked(probs):
    return dist.Bernoulli(probs).mask(False)


def after_noise():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("b", dist.Bernoulli(logits=z))


@pytest.mark.parametrize(
    ("kind", "guide", "message"),
    [
        (
            DisARM,
            one_site(dist.Categorical, torch.ones(2, 3)),
            "expected Bernoulli values, got Categorical",
        ),
        (LocalARMS, one_site(dist.Poisson, torch.ones(2)), "expected Bernoulli values, got Poisson"),
        (
            DisARMTree,
            one_site(dist.Bernoulli, torch.full((2,), 0.5)),
            "expected categorical values, got Ber",
        ),
        (
            ARMS,
            one_site(masked, torch.full((2,), 0.5)),
            "expected Bernoulli values, got M",
        ),
        (DisARM, after_noise, "expected a distribution that is the same for all particles, got one that earlier"),
        (CARMS, one_site(dist.Categorical, torch.ones(2, 33)), "expected at most 32 values, .* got 33"),
    ],
)
def test_what_cannot_be_coupled_is_refused(kind, guide, message):
    with pytest.raises(ValueError, match=f"{message}.*") as error:
        kind(2).loss(guide, guide)
    assert "\n" not in str(error.value)
    assert "'b'" in str(error.value) or kind is CARMS


def test_options_that_mean_nothing():
    for kind in (DisARM, ARMS, LocalARMS):
        with pytest.raises(ValueError, match="^vectorize_particles: expected True for .*, got False$"):
            kind(2, vectorize_particles=False)
    with pytest.raises(ValueError, match="^candidates: expected at least 2, got 1$"):
        LocalARMS(2, candidates=1)
    with pytest.raises(ValueError, match="^num_particles: expected at least 2 for DisARM, got 1$"):
        DisARM(1)


def undeclared(rows):
    def model():
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.4)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.arange(rows * 3.0).reshape(rows, 3))

    return model


@pytest.mark.parametrize(
    ("elbo", "drawn"),
    [
        (LocalDisARM(1), 2),
        (LocalARMS(1), 3),
        (LocalARMS(2, candidates=3), 5),
    ],
)
def test_particles_that_only_compare_count_among_all(elbo, drawn):
    """A dimension of their number that no plate declares would be averaged over like theirs."""

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=torch.zeros(3)))

    with pytest.raises(ValueError, match="^site 'x': .* no plate declares"):
        elbo.loss(undeclared(drawn), guide)


class Stubborn(dist.Bernoulli):
    """A bit of one's own, which is always on."""

    def sample(self, sample_shape=()):
        return torch.ones(self.batch_shape)


def test_a_family_of_ones_own_is_not_drawn_in_another_way():
    with pytest.raises(
        ValueError, match="^site 'b': expected Bernoulli values, got Stubborn, which DisARM cannot"
    ):
        DisARM(2).loss(*[one_site(Stubborn, torch.full((2,), 0.5))] * 2)


@pytest.mark.parametrize("elbo", [LocalDisARM(2, noise="common"), MultiSampleELBO(2, noise="common")])
@pytest.mark.parametrize("rule", [dreg, stl])
def test_a_rule_for_independent_particles_under_common_noise(elbo, rule):
    """At a site as for all of an objective."""

    def program():
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)))
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0), infer={"estimator": rule})

    model = pyro.poutine.infer_config(program, lambda site: {"estimator": None})
    with pytest.raises(ValueError, match="^site 'z': expected iwae with common noise, as .* for independent, got"):
        elbo.loss(model, program)
