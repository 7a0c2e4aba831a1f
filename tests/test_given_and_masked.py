"""Latents whose value is given, masked or scaled, and sites of the guide alone: right, or refused by name."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from programs import FLOAT, Fixed, log_normal, rows
from vma_pyro.infer import (
    RLOO,
    ExactELBO,
    MultiSampleELBO,
    ThermodynamicELBO,
    WakeWake,
    dreg,
    log_weights,
    make,
    reinforce,
)

N = 4
X = torch.tensor([0.3, 1.0, -0.5, 0.2])
SAMPLED = (
    "reinforce",
    "vimco",
    "loo",
    "vimco+dreg",
    "vimco+chunks",
    "vimco+resampled",
    "rloo",
    "wake-wake",
    "tvo",
)

# 1. Given values.

KNOWN = torch.tensor([0, 2, 1, 2])
PRIOR, MEANS, SECOND = torch.tensor([0.1, 0.4, -0.2]), torch.tensor([[0.8, -0.5], [0.2, 1.0], [-1.0, 0.3]]), 0.3


def known_class(x, logits=None):
    """A class a, of which b is a variant; with logits: the guide, whose q(b) is the posterior given a."""
    with pyro.plate("data", N):
        a = pyro.sample("a", dist.Categorical(logits=PRIOR if logits is None else logits))
        if logits is None:
            b = pyro.sample("b", dist.Bernoulli(SECOND)).long()
            pyro.sample("x", dist.Normal(MEANS[a, b], 1.0), obs=x)
        else:
            pyro.sample("b", dist.Bernoulli(_posterior(x)[:, 1]))


def _joint(x):
    """p(b, x | known a) [N, 2], by hand."""
    mean = MEANS[KNOWN]
    density = torch.exp(-0.5 * (x[:, None] - mean) ** 2) / math.sqrt(2 * math.pi)
    return density * torch.tensor([1 - SECOND, SECOND])


def _posterior(x):
    joint = _joint(x)
    return joint / joint.sum(1, keepdim=True)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_given_value_is_not_in_log_q(name):
    """At the posterior of the rest every draw weighs p(x, a): the loss is -log p(x, a); q(a) learns nothing."""
    logits = torch.zeros(N, 3, requires_grad=True)
    model = pyro.condition(known_class, {"a": KNOWN})
    guide = pyro.condition(lambda x: known_class(x, logits), {"a": KNOWN})
    loss = make(name, 2).differentiable_loss(model, guide, X)
    want = -(PRIOR.log_softmax(0)[KNOWN] + _joint(X).sum(1).log()).sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
        assert gradient is None or gradient.abs().max() == 0


def test_an_observed_latent_of_the_guide_is_not_drawn_either():
    """A continuous latent, given by `obs=` in the guide itself; the discrete one is drawn from the posterior."""
    z = torch.tensor([0.2, -1.0, 0.7, 0.0])
    prior = torch.tensor([0.25, 0.75])
    joint = prior.log() + dist.Normal(z[:, None] + torch.tensor([0.0, 1.0]), 1.0).log_prob(X[:, None])  # [N, 2]

    def model(x):
        with pyro.plate("data", N):
            given = pyro.sample("z", dist.Normal(0.0, 2.0), obs=z)
            a = pyro.sample("a", dist.Bernoulli(prior[1]))
            pyro.sample("x", dist.Normal(given + a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(5.0, 0.1), obs=z)
            pyro.sample("a", dist.Bernoulli(joint.softmax(1)[:, 1]))

    want = -(dist.Normal(0.0, 2.0).log_prob(z) + joint.logsumexp(1)).sum().item()
    for name in ("vimco", "rloo", "wake-wake", "vimco+dreg+resampled"):
        assert make(name, 3).loss(model, guide, X) == pytest.approx(want, rel=1e-5), name


@pytest.mark.parametrize(
    ("of_model", "of_guide", "message"),
    [
        (KNOWN, None, "site 'a': expected drawn in both programs or given in both"),
        (None, KNOWN, "site 'a': expected its value given in the model as in the guide"),
        (KNOWN, KNOWN.flip(0), "site 'a': expected the same given value in model and guide"),
    ],
)
def test_a_value_given_in_one_program_alone_is_refused(of_model, of_guide, message):
    logits = torch.zeros(N, 3)

    def given(program, value):
        return program if value is None else pyro.condition(program, {"a": value})

    pair = given(known_class, of_model), given(lambda x: known_class(x, logits), of_guide)
    for name in SAMPLED:
        with pytest.raises(ValueError, match=message) as error:
            make(name, 2).loss(*pair, X)
        assert "\n" not in str(error.value)


def test_no_dreams_of_a_function_of_noise():
    """An autoguide's Delta at a dreamed value: log q would be -inf, and its gradient zero."""
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(plain)
        guide(X)
        with pytest.raises(ValueError, match="insomnia: expected 1 .no sleep. where site 'z' is a Delta"):
            WakeWake(2, insomnia=0.5, max_plate_nesting=1).differentiable_loss(plain, guide, X)
        for name in ("vimco+common", "wake-wake", "tvo", "vimco+dreg"):  # which have the noise itself
            loss = make(name, 3).differentiable_loss(plain, guide, X)
            gradients = torch.autograd.grad(loss, list(guide.parameters()))
            assert all(g.abs().max() > 0 for g in gradients), name


def test_no_dreams_of_a_given_value():
    pair = (
        pyro.condition(known_class, {"a": KNOWN}),
        pyro.condition(lambda x: known_class(x, PRIOR), {"a": KNOWN}),
    )
    with pytest.raises(ValueError, match="insomnia: expected 1 .no sleep. where the value of site 'a' is given"):
        WakeWake(2, insomnia=0.5, max_plate_nesting=1).differentiable_loss(*pair, X)


# 2. Masks and scales of latents.


def irrelevant(x, *, mask=True, scale=1.0, loc=None):
    """A latent on which nothing depends: every right bound of log p(x) is log p(x) itself."""
    with pyro.plate("data", N):
        with poutine.mask(mask=mask), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(0.0, 1.0) if loc is None else dist.Normal(loc, 0.3))
        if loc is None:
            pyro.sample("x", dist.Normal(0.3, 1.0), obs=x)


HALF = torch.tensor([True, False, True, False])
EVIDENCE = dist.Normal(0.3, 1.0).log_prob(X).sum().item()


@pytest.mark.parametrize(
    ("of_model", "of_guide", "what"),
    [
        ({"mask": HALF}, {}, "mask"),
        ({}, {"mask": HALF}, "mask"),
        ({"mask": HALF}, {"mask": ~HALF}, "mask"),
        ({"mask": False}, {"mask": HALF}, "mask"),
        ({"scale": 0.1}, {}, "scale"),
        ({"scale": 0.5}, {"scale": torch.tensor([0.5, 0.5, 0.5, 0.4])}, "scale"),
    ],
)
def test_another_power_in_the_model_than_in_the_guide_is_refused(of_model, of_guide, what):
    for name in (*SAMPLED, "vimco+common", "vimco+2z", "ovis-mc", "vimco+stl"):
        with pytest.raises(ValueError, match=f"site 'z': expected the same {what} in model and guide") as error:
            make(name, 2).loss(
                lambda x: irrelevant(x, **of_model), lambda x: irrelevant(x, loc=0.4, **of_guide), X
            )
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [False, torch.zeros(N, dtype=torch.bool)])
def test_the_same_mask_in_both_takes_the_draw_out_of_the_weight(mask):
    copy = mask if mask is False else mask.clone()
    pair = (lambda x: irrelevant(x, mask=mask)), (lambda x: irrelevant(x, mask=copy, loc=0.4))
    for name in SAMPLED:
        assert make(name, 2).loss(*pair, X) == pytest.approx(-EVIDENCE, rel=1e-5), name


def half_observed(x, known, seen, q=None, masked=True):
    """`obs_mask`: the class is known of some; the guide draws it for all, and has to be masked there."""
    with pyro.plate("data", N):
        if q is not None:
            with poutine.mask(mask=~seen if masked else True):
                pyro.sample("a_unobserved", dist.Bernoulli(q))
            return
        a = pyro.sample("a", dist.Bernoulli(0.25), obs=known, obs_mask=seen)
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def test_a_partly_observed_latent():
    known, seen = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([True, False, True, False])
    log_p = torch.tensor([0.75, 0.25]).log()
    joint = log_p + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(X[:, None])  # [N, 2]
    want = -torch.where(seen, joint.gather(1, known.long()[:, None])[:, 0], joint.logsumexp(1)).sum().item()
    q = joint.softmax(1)[:, 1]
    for name in ("vimco", "rloo", "wake-wake"):
        model = lambda x: half_observed(x, known, seen)  # noqa: E731
        got = make(name, 3).loss(model, lambda x: half_observed(x, known, seen, q), X)
        assert got == pytest.approx(want, rel=1e-5)
        with pytest.raises(ValueError, match="site 'a_unobserved': expected the same mask"):
            make(name, 3).loss(model, lambda x: half_observed(x, known, seen, q, masked=False), X)


class MaskedByItself:
    """Masks of distributions: a ~ Categorical(3), or two Bernoullis as one event of which some elements count."""

    outcomes = 3

    def __init__(self, how):
        self.how = how
        g = torch.Generator().manual_seed(0)
        self.values = {n: torch.randn(4, generator=g, **FLOAT) for n in ("prior", "mean", "q")}

    def _site(self, logits):
        kind = torch.arange(len(logits)) % 2 == 0
        if self.how == "event":  # of the two bits the second counts for even datapoints alone
            mask = torch.stack([torch.ones_like(kind), kind], -1)
            bits = dist.Bernoulli(logits=logits[..., :2]).mask(mask).to_event(1)
            return pyro.sample("a", bits) @ torch.tensor([2.0, 1.0], **FLOAT)
        mask = {"False": False, "True": True, "tensor": kind}[self.how]
        return 1.0 * pyro.sample("a", dist.Categorical(logits=logits[..., :3]).mask(mask))

    def model(self, p, x):
        with pyro.plate("data", len(x)):
            a = self._site(p["prior"]).long()
            pyro.sample("x", dist.Normal(p["mean"][torch.arange(len(x)), a], 1.0), obs=x)

    def guide(self, p, x):
        with pyro.plate("data", len(x)):
            self._site(p["q"])

    def table(self, p, even):
        """log q of the draw, and log w, [outcomes], by hand; and the values of the site."""
        if self.how == "event":
            bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), **FLOAT)
            terms = [
                torch.where(bits == 1, -torch.log1p((-p[n][:2]).exp()), -torch.log1p(p[n][:2].exp())) for n in "pq"
            ]
            counts = torch.tensor([1.0, 1.0 if even else 0.0], **FLOAT)
            log_q, ratio = terms[1].sum(1), ((terms[0] - terms[1]) * counts).sum(1)
        else:
            bits = torch.arange(3)
            log_q = p["q"][:3].log_softmax(0)
            counts = {"False": 0.0, "True": 1.0, "tensor": float(even)}[self.how]
            ratio = counts * (p["p"][:3].log_softmax(0) - log_q)
        mean = p["mean"][: len(bits)]
        return log_q, ratio + log_normal(torch.tensor(0.7, **FLOAT), mean, torch.tensor(1.0, **FLOAT)), bits


@pytest.mark.parametrize("how", ["False", "True", "tensor", "event"])
@pytest.mark.parametrize("name", ["vimco", "reinforce", "loo", "rloo", "vimco+chunks"])
def test_the_score_is_that_of_the_distribution_under_its_mask(name, how):
    """Sum over all outcomes of two particles of probability times gradient, against the enumerated objective."""
    program = MaskedByItself(how)
    for even in (True, False):
        leaf = {
            n: program.values[k].clone().requires_grad_()
            for n, k in (("p", "prior"), ("mean", "mean"), ("q", "q"))
        }
        log_q, log_w, values = program.table(leaf, even)
        pairs = torch.tensor(list(itertools.product(range(len(log_q)), repeat=2)))
        probability = log_q[pairs].sum(1).exp()
        objective = log_w[pairs].mean(1) if name == "rloo" else log_w[pairs].logsumexp(1) - math.log(2)
        want = torch.autograd.grad(-(probability * objective).sum(), list(leaf.values()))
        # One row per outcome, all of one kind: rows of the other kind stand between them and count nothing.
        count = 2 * len(pairs)
        here = torch.arange(count) % 2 == (0 if even else 1)
        p = rows(program.values, count)
        drawn = values[pairs.T].repeat_interleave(2, 1)  # [2, 2 O, ...]
        x = torch.full((count,), 0.7, **FLOAT)
        loss = make(name, 2).differentiable_loss(program.model, Fixed({"a": drawn})(program.guide), p, x)
        got = torch.autograd.grad(loss, [p[n] for n in ("prior", "mean", "q")], allow_unused=True)
        weight = probability.detach().repeat_interleave(2) * here
        for mine, right, n in zip(got, want, ("prior", "mean", "q"), strict=True):
            mine = torch.zeros_like(right) if mine is None else torch.einsum("n,ns->s", weight, mine)
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10, msg=f"{n}, even {even}")


@pytest.mark.parametrize("how", ["mask of the distribution", "mask within the event", "handler"])
def test_dreg_takes_its_power_from_the_mask(how):
    """K = 1: dreg is the path of log p - log q with q held fixed, or of log p where q does not count; by hand."""
    loc, log_scale = torch.zeros(N, 2, **FLOAT, requires_grad=True), torch.zeros(N, 2, **FLOAT, requires_grad=True)
    counts = HALF[:, None] if how != "mask within the event" else torch.stack([HALF, ~HALF], -1)
    noise: dict[str, torch.Tensor] = {}

    def site(fn):
        if how == "mask of the distribution":
            return pyro.sample("z", fn.to_event(1).mask(HALF))
        if how == "mask within the event":
            return pyro.sample("z", fn.mask(counts).to_event(1))
        with poutine.mask(mask=HALF):
            return pyro.sample("z", fn.to_event(1))

    def model():
        with pyro.plate("data", N):
            z = site(dist.Normal(torch.zeros(N, 2, **FLOAT), 1.0))
            noise["z"] = z.detach()
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=X.double())

    def guide():
        with pyro.plate("data", N):
            site(dist.Normal(loc, log_scale.exp()))

    elbo = MultiSampleELBO(1, baseline=reinforce, pathwise=dreg, max_plate_nesting=1)
    got = torch.autograd.grad(-elbo.differentiable_loss(model, guide), (loc, log_scale))
    z, path = noise["z"], (noise["z"] - loc) / log_scale.exp()
    slope = (X.double() - z.sum(-1))[:, None] / 0.25 + counts * (-z + (z - loc) / log_scale.exp() ** 2)
    torch.testing.assert_close(got[0], slope.detach())
    torch.testing.assert_close(got[1], (slope * path * log_scale.exp()).detach())


# 3. Sites of the guide alone.


def plain(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_auxiliary(x, first):
    with pyro.plate("data", N):
        u = pyro.sample("u", first, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(1.0 * u, 0.7))


@pytest.mark.parametrize(
    "first", [dist.Categorical(logits=torch.zeros(3)), dist.Poisson(1.0), dist.Normal(0.0, 0.5)]
)
def test_an_auxiliary_site_needs_a_reverse_model(first):
    for name in SAMPLED:
        with pytest.raises(
            ValueError, match="site 'u': expected .* without a reverse model r.u . latents."
        ) as error:
            make(name, 2).loss(plain, lambda x: with_auxiliary(x, first), X)
        assert "\n" not in str(error.value)


def test_with_a_reverse_model_it_is_a_bound():
    """r(u | z) is the guide's own posterior of u, and q(z) that of x: every weight is p(x)."""
    means, prior = torch.tensor([-0.5, 0.8]), torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            log_r = prior.log() + dist.Normal(means, 0.7).log_prob(z[..., None])
            pyro.sample("u", dist.Categorical(logits=log_r))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Categorical(prior))
            pyro.sample("z", dist.Normal(means[u], 0.7))

    torch.manual_seed(0)
    bounds = log_weights(model, guide, (X.repeat(5000),), num_particles=50).logsumexp(0) - math.log(50)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(X).mean().item()
    assert evidence - 0.1 < bounds.mean() < evidence + 4 * bounds.std() / len(bounds) ** 0.5


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_have_auxiliary_sites_that_latents_are_a_function_of(kind):
    """A constrained latent under dreg: the gradient is that of the plain rule, on 120 draws of each; |z| < 4.5."""

    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.5))
        pyro.sample("x", dist.Exponential(z), obs=torch.tensor(0.8))

    with pyro.settings.context(module_local_params=True):
        guide = kind(model)
        guide()
        parameters = list(guide.parameters())
        mean = {}
        for name in ("vimco", "vimco+dreg"):
            torch.manual_seed(0)
            elbo = make(name, 2)
            draws = []
            for _ in range(120):
                gradients = torch.autograd.grad(elbo.differentiable_loss(model, guide), parameters)
                draws.append(torch.cat([g.flatten() for g in gradients]))
            stacked = torch.stack(draws).double()
            mean[name] = stacked.mean(0), stacked.var(0) / len(stacked)
    difference = mean["vimco"][0] - mean["vimco+dreg"][0]
    assert (difference.abs() <= 4.5 * (mean["vimco"][1] + mean["vimco+dreg"][1]).sqrt()).all()
    assert mean["vimco"][0].abs().max() > 0.05


def test_an_auxiliary_site_and_its_function_have_one_power():
    """A masked Delta of an auxiliary draw that counts, and a Delta that comes before and is no function of it."""

    def masked(x, guide=False, first=False):
        with pyro.plate("data", N):
            if guide and not first:
                u = pyro.sample("u", dist.Normal(torch.zeros(N), 3.0), infer={"is_auxiliary": True})
            with poutine.mask(mask=first):
                z = pyro.sample(
                    "z", dist.Delta(torch.zeros(N) if first else u) if guide else dist.Normal(0.0, 1.0)
                )
            if guide and first:
                pyro.sample("u", dist.Normal(z, 3.0), infer={"is_auxiliary": True})
            if not guide:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for first, message in (
        (False, "site 'u': expected the mask and scale of 'z'"),
        (True, "site 'u': .* found too few"),
    ):
        for name in SAMPLED:
            with pytest.raises(ValueError, match=message):
                make(name, 2).loss(lambda x, f=first: masked(x, first=f), lambda x, f=first: masked(x, True, f), X)


@pytest.mark.parametrize("name", ["wake-wake", "wake-wake-uncentred", "tvo"])
def test_a_point_learns_nothing_where_samples_are_held_fixed(name):
    place = torch.zeros(N, requires_grad=True)

    def guide(x, learned="v"):
        with pyro.plate("data", N):
            v, log_density = (place, torch.zeros(N)) if learned == "v" else (torch.zeros(N), place)
            pyro.sample("z", dist.Delta(v, log_density))

    for learned in ("v", "log_density"):
        with pytest.raises(
            ValueError, match="site 'z': expected a density where samples are held fixed, got Delta"
        ):
            make(name, 3).differentiable_loss(plain, lambda x, w=learned: guide(x, w), X)


def test_a_point_has_no_gate():
    """K equal draws of a `Delta` have equal weights: the gradient is that of log p, also under dreg."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.tensor([0.3, -0.2, 0.4, 1.0]))

        def forward(self, x):
            with pyro.plate("data", N):
                pyro.sample("z", dist.Delta(self.z))

    guide = Point()
    for name in ("vimco", "vimco+dreg", "vimco+stl"):
        (gradient,) = torch.autograd.grad(-make(name, 3).differentiable_loss(plain, guide, X), [guide.z])
        torch.testing.assert_close(gradient, (X - 2 * guide.z).detach())


def test_objectives_agree_that_a_masked_draw_weighs_one():
    """The single-sample, the K-sample, the thermodynamic and the exact objective where a latent is masked."""

    def program(x, q=None):
        with pyro.plate("data", N):
            with poutine.mask(mask=False):
                pyro.sample("a", dist.Categorical(logits=torch.zeros(3) if q is None else q))
            if q is None:
                pyro.sample("x", dist.Normal(0.3, 1.0), obs=x)

    pair = program, lambda x: program(x, torch.tensor([0.5, -0.5, 0.3]))
    for elbo in (MultiSampleELBO(2), RLOO(2), ThermodynamicELBO(3), ExactELBO(site="a")):
        assert elbo.loss(*pair, X) == pytest.approx(-EVIDENCE, rel=1e-5)
