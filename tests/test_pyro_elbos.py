"""Pyro's estimators in this package: the right gradient whatever the program does, or one line that says why."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionGamma

from programs import FLOAT, Fixed, log_normal, rows
from vma_pyro.infer import EnumeratedELBO, GraphELBO, loo
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.pyro_traces import importance_traces

X = torch.tensor(0.8, **FLOAT)
TRIALS = 60_000


def parameters():
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(3, generator=generator, **FLOAT) for name in ("mean", "logits", "second")}


def in_place(mean, a):
    found = torch.zeros(a.shape, **FLOAT)
    for value in range(3):
        found[a == value] = mean[:, value].expand(a.shape)[a == value]
    return found


def vmapped(mean, a):
    def read(row, chosen):
        return (row * torch.nn.functional.one_hot(chosen, 3)).sum(-1)

    return torch.func.vmap(read, in_dims=(0, -1), out_dims=-1)(mean, a)


def as_lists(mean, a):
    flat = [mean[i, value] for row in a.reshape(-1, len(mean)).tolist() for i, value in enumerate(row)]
    return torch.stack(flat).reshape(a.shape)


def two_sites(read, wrap=lambda fn: fn):
    """a, then b given a; the likelihood reads both."""

    def model(p):
        with pyro.plate("data", len(p["mean"])):
            a = pyro.sample("a", wrap(dist.Categorical(logits=torch.zeros(3, **FLOAT))))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, **FLOAT)))
            pyro.sample("x", dist.Normal(read(p["mean"], a) + b, 1.0), obs=X.expand(len(p["mean"])))

    def guide(p):
        with pyro.plate("data", len(p["mean"])):
            a = pyro.sample("a", wrap(dist.Categorical(logits=p["logits"])))
            pyro.sample("b", dist.Bernoulli(logits=p["second"][torch.arange(len(p["mean"])), a]))

    return model, guide


def table(p, *, masked):
    """log q(a, b) and log w [6] of one datapoint, without Pyro."""
    log_q, log_w = [], []
    for a, b in itertools.product(range(3), range(2)):
        q_a = p["logits"].log_softmax(-1)[a]
        q_b = torch.nn.functional.logsigmoid(p["second"][a] * (2 * b - 1))
        prior = math.log(0.3 if b else 0.7) - (0.0 if masked else math.log(3))
        log_q.append(q_a + q_b)
        log_x = log_normal(X, p["mean"][a] + b, torch.tensor(1.0, **FLOAT))
        log_w.append(prior + log_x - q_b - (0.0 if masked else q_a))
    return torch.stack(log_q), torch.stack(log_w)


MASKS = {
    "none": lambda fn: fn,
    "boolean": lambda fn: fn.mask(False),
    "tensor": lambda fn: fn.mask(torch.zeros((), dtype=torch.bool)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("read", [in_place, vmapped, as_lists])
@pytest.mark.parametrize("K", [1, 2])
def test_graph_by_enumeration(read, mask, K):
    """Sum over all outcomes of K particles of probability times gradient, against autograd of the summed bound."""
    model, guide = two_sites(read, MASKS[mask])
    log_q, _ = table(parameters(), masked=False)
    outcomes = torch.tensor(list(itertools.product(range(6), repeat=K))).T  # [K, N]
    p = rows(parameters(), outcomes.shape[1])
    values = {"a": outcomes // 2, "b": (outcomes % 2).double()}
    if K == 1:
        values = {name: value[0] for name, value in values.items()}
    elbo = GraphELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, Fixed(values)(guide), p)
    probability = log_q[outcomes].sum(0).exp()
    one = {name: value.clone().requires_grad_() for name, value in parameters().items()}
    log_q, log_w = table(one, masked=mask != "none")
    wanted = torch.autograd.grad(-(log_q.exp() * log_w).sum(), list(one.values()))
    for got, want in zip(torch.autograd.grad(loss, list(p.values())), wanted, strict=True):
        torch.testing.assert_close((probability[:, None] * got).sum(0), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_enumeration_with_masked_distributions(mask):
    model, guide = two_sites(lambda mean, a: mean[torch.arange(len(mean)), a], MASKS[mask])
    p = rows(parameters(), 1)
    got = torch.autograd.grad(
        EnumeratedELBO(max_plate_nesting=1).differentiable_loss(model, guide, p), list(p.values())
    )
    one = {name: value.clone().requires_grad_() for name, value in parameters().items()}
    log_q, log_w = table(one, masked=mask != "none")
    wanted = torch.autograd.grad(-(log_q.exp() * log_w).sum(), list(one.values()))
    for g, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(g[0], want, rtol=1e-10, atol=1e-12)


def test_implicit_reparameterisation_after_a_discrete_site():
    """Beta's gradient is an autograd function. Quadrature over z; 60,000 trials, |z| < 4.5."""
    values = {"logits": torch.tensor([0.2, -0.4], **FLOAT), "shape": torch.tensor([0.5, 1.2], **FLOAT)}

    def model(p):
        with pyro.plate("data", len(p["shape"])):
            pyro.sample("a", dist.Bernoulli(torch.tensor(0.5, **FLOAT)))
            z = pyro.sample("z", dist.Beta(torch.tensor(2.0, **FLOAT), torch.tensor(2.0, **FLOAT)))
            pyro.sample("x", dist.Normal(4 * z, 1.0), obs=X.expand(len(p["shape"])))

    def guide(p):
        with pyro.plate("data", len(p["shape"])):
            a = pyro.sample("a", dist.Bernoulli(logits=p["logits"][:, 0]))
            pyro.sample("z", dist.Beta(shape(p, a), torch.tensor(3.0, **FLOAT)))

    def shape(p, a):
        return 2 + torch.where(a == 1, p["shape"][:, 1], p["shape"][:, 0]).exp()

    one = {name: value.clone().requires_grad_() for name, value in values.items()}
    z = (torch.arange(20_000, **FLOAT) + 0.5) / 20_000
    bound = 0.0
    for a in (0, 1):
        q = torch.distributions.Beta(2 + one["shape"][a].exp(), torch.tensor(3.0, **FLOAT))
        log_p = torch.distributions.Beta(2.0, 2.0).log_prob(z) + log_normal(X, 4 * z, 1.0) + math.log(0.5)
        q_a = torch.nn.functional.logsigmoid(one["logits"][0] * (2 * a - 1))
        bound = bound + q_a.exp() * ((q.log_prob(z).exp() * (log_p - q.log_prob(z))).mean() - q_a)
    want = torch.cat(torch.autograd.grad(-bound, list(one.values())))
    torch.manual_seed(0)
    p = rows(values, TRIALS)
    loss = GraphELBO(max_plate_nesting=1).differentiable_loss(model, guide, p)
    got = torch.cat(torch.autograd.grad(loss, list(p.values())), 1)
    z_scores = (got.mean(0) - want) / (got.std(0) / TRIALS**0.5).clamp(min=1e-12)
    assert z_scores.abs().max() < 4.5, z_scores


@pytest.mark.parametrize("to_event", [False, True])
def test_rejection_samplers_have_a_score(to_event):
    """A Gamma by acceptance and rejection has a path and a score. Closed form; 60,000 trials, |z| < 4.5."""

    def in_event(fn):
        return fn.to_event(1) if to_event else fn

    def model(p):
        with pyro.plate("data", len(p["shape"])):
            shape = (len(p["shape"]), 1) if to_event else (len(p["shape"]),)
            pyro.sample("z", in_event(dist.Gamma(torch.full(shape, 4.0, **FLOAT), 1.0)))

    def guide(p):
        with pyro.plate("data", len(p["shape"])):
            shape = 1 + (p["shape"].exp() if to_event else p["shape"].exp()[:, 0])
            pyro.sample("z", in_event(RejectionGamma(shape, torch.ones_like(shape))))

    one = torch.tensor([-4.0], **FLOAT, requires_grad=True)
    prior = torch.distributions.Gamma(torch.tensor(4.0, **FLOAT), torch.tensor(1.0, **FLOAT))
    guide_at = torch.distributions.Gamma(1 + one.exp(), torch.tensor(1.0, **FLOAT))
    divergence = torch.distributions.kl_divergence(guide_at, prior)
    (want,) = torch.autograd.grad(divergence.sum(), one)
    torch.manual_seed(0)
    p = rows({"shape": torch.tensor([-4.0], **FLOAT)}, TRIALS)
    loss = GraphELBO(max_plate_nesting=1).differentiable_loss(model, guide, p)
    (got,) = torch.autograd.grad(loss, p["shape"])
    assert abs(got.mean() - want) / (got.std() / TRIALS**0.5) < 4.5


def test_a_value_given_to_both_costs_the_guide_nothing():
    """The loss is -log p(x, a) of the known a, and q(a) learns nothing from it; without any handler it would."""
    model, guide = two_sites(lambda mean, a: mean[torch.arange(len(mean)), a])
    p = rows(parameters(), 2)
    known = {"a": torch.tensor([0, 2]), "b": torch.tensor([1.0, 0.0], **FLOAT)}
    programs = pyro.condition(model, known), pyro.condition(guide, known)
    log_x = log_normal(X, p["mean"][torch.arange(2), known["a"]] + known["b"], torch.tensor(1.0, **FLOAT))
    want = -(log_x - math.log(3) + torch.tensor([0.3, 0.7], **FLOAT).log()).sum()
    for elbo in (GraphELBO(max_plate_nesting=1), EnumeratedELBO(max_plate_nesting=1)):
        loss = elbo.differentiable_loss(*programs, p)
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
        assert [g is not None and bool(g.any()) for g in gradients] == [True, False, False]


def test_pyros_own_baselines_lower_the_noise_and_keep_the_mean():
    model, _ = two_sites(lambda mean, a: mean[torch.arange(len(mean)), a])

    def guide(p, infer):
        with pyro.plate("data", len(p["mean"])):
            a = pyro.sample("a", dist.Categorical(logits=p["logits"]), infer=infer)
            pyro.sample("b", dist.Bernoulli(logits=p["second"][torch.arange(len(p["mean"])), a]), infer=infer)

    log_q, log_w = table(parameters(), masked=False)
    bound = (log_q.exp() * log_w).sum()
    found = {}
    for name, infer in {"none": {}, "value": {"baseline": {"baseline_value": bound.expand(TRIALS)}}}.items():
        torch.manual_seed(1)
        p = rows(parameters(), TRIALS)
        elbo = GraphELBO(max_plate_nesting=1)
        loss = elbo.differentiable_loss(lambda p, infer: model(p), guide, p, infer)
        found[name] = torch.autograd.grad(loss, p["logits"])[0]
    difference = (found["none"] - found["value"]).mean(0)
    spread = (found["none"] - found["value"]).std(0) / TRIALS**0.5
    assert (difference / spread).abs().max() < 4.5
    assert found["value"].var(0).sum() < 0.8 * found["none"].var(0).sum()


def program(**at):
    """A model and a guide that differ from a right pair in one thing."""

    def sample(role):
        with pyro.plate("data", 4):
            logits = torch.zeros(3) if role == "model" else torch.zeros(3, requires_grad=True)
            mask, scale = at.get(f"{role}_mask"), at.get(f"{role}_scale", 1.0)
            with poutine.mask(mask=True if mask is None else mask), poutine.scale(scale=scale):
                a = pyro.sample(
                    "a",
                    dist.Categorical(logits=logits),
                    infer=at.get("infer", {}) if role == "guide" else {},
                    obs=at.get(f"{role}_value"),
                )
            if role == "guide" and "auxiliary" in at:
                pyro.sample("c", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
            z = pyro.sample("z", dist.Normal(torch.zeros(at.get("undeclared", ()) + (4,)), 1.0))
            if role == "model":
                pyro.sample("x", dist.Normal(z + a, 1.0), obs=torch.zeros(4))

    return (lambda: sample("model")), (lambda: sample("guide"))


REFUSED = {
    "mask": ({"model_mask": torch.tensor([True, True, False, True])}, "site 'a': expected the same mask in model"),
    "scale": ({"guide_scale": 0.5}, "site 'a': expected the same scale in model and guide"),
    "estimator": ({"infer": {"estimator": loo}}, "site 'a': expected no score baseline of its own under"),
    "auxiliary": ({"auxiliary": True}, "site 'c': expected in the model as in the guide"),
    "given to the guide": (
        {"guide_value": torch.zeros(4, dtype=torch.long)},
        "site 'a': expected its value given",
    ),
    "given to the model": ({"model_value": torch.zeros(4, dtype=torch.long)}, "site 'a': expected drawn in both"),
    "undeclared": ({"undeclared": (2,)}, "site 'z': expected one log probability per element of its plates"),
    "undeclared, of the values' size": (
        {"undeclared": (3,)},
        "site 'z': expected one log probability per element",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("kind", ["graph", "graph, 2 particles", "enum"])
def test_what_the_other_estimators_refuse(what, validation, kind):
    elbo = {
        "graph": lambda: GraphELBO(max_plate_nesting=1),
        "graph, 2 particles": lambda: GraphELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        "enum": lambda: EnumeratedELBO(max_plate_nesting=1),
    }[kind]()
    at, message = REFUSED[what]
    with pyro.validation_enabled(validation):
        for method in (elbo.loss, elbo.differentiable_loss):
            with pytest.raises(ValueError, match=f"^{message}") as error:
                method(*program(**at))
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("of_model", [True, False])
def test_a_value_of_probability_zero_counts_nothing_under_enumeration(of_model):
    """Ruled out by the guide, and by the model as well or not: the sum over the other values, by hand."""
    mask = torch.tensor([True, True, False, True])
    q = torch.tensor([0.3, -0.2, 0.5, 0.1], **FLOAT, requires_grad=True)
    means, x = torch.tensor([0.0, 1.0, 2.0, -1.0], **FLOAT), torch.tensor([0.3, 0.8], **FLOAT)

    def ruled_out(logits):
        return logits.masked_fill(~mask, -math.inf)

    prior = ruled_out(torch.zeros(4, **FLOAT)) if of_model else torch.zeros(4, **FLOAT)

    def model():
        with pyro.plate("data", 2):
            a = pyro.sample("a", dist.Categorical(logits=prior))
            pyro.sample("x", dist.Normal(means[a], 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("a", dist.Categorical(logits=ruled_out(q)))

    log_q, log_p = ruled_out(q).log_softmax(0)[mask], prior.log_softmax(0)[mask]
    log_w = log_p + dist.Normal(means[mask], 1.0).log_prob(x[:, None]) - log_q
    want = -(log_q.exp() * log_w).sum()
    got = EnumeratedELBO(max_plate_nesting=1).differentiable_loss(model, guide)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, q), torch.autograd.grad(want, q))


def test_what_enumeration_cannot_run_is_told_in_one_line():
    def model():
        with pyro.plate("data", 1):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(float(a.item()), 1.0), obs=torch.zeros(1))

    def guide():
        with pyro.plate("data", 1):
            pyro.sample("a", dist.Bernoulli(torch.tensor(0.5, requires_grad=True)))

    with pytest.raises(
        ValueError, match="^model: expected to take all values of its discrete sites at once"
    ) as error:
        EnumeratedELBO(max_plate_nesting=1).loss(model, guide)
    assert "\n" not in str(error.value)
    assert math.isfinite(GraphELBO(max_plate_nesting=1).loss(model, guide))


def test_elements_of_a_sequential_plate_do_not_share_costs():
    """The score of one element times the costs of the other would be nothing but noise."""

    def programs(p):
        def model():
            for i in pyro.plate("data", 2):
                a = pyro.sample(f"a{i}", dist.Bernoulli(0.5))
                pyro.sample(f"x{i}", dist.Normal(10.0 * i + a, 1.0), obs=torch.zeros(()))

        def guide():
            for i in pyro.plate("data", 2):
                pyro.sample(f"a{i}", dist.Bernoulli(logits=p[i]))

        return model, guide

    p = torch.zeros(2, requires_grad=True)
    model, guide = programs(p)
    fixed = Fixed({"a0": torch.tensor(1.0), "a1": torch.tensor(1.0)})(guide)
    loss = GraphELBO(max_plate_nesting=0).differentiable_loss(model, fixed)
    (gradient,) = torch.autograd.grad(loss, p)
    log_x = dist.Normal(torch.tensor([1.0, 11.0]), 1.0).log_prob(torch.zeros(2))
    torch.testing.assert_close(gradient, -log_x * 0.5)  # log p(a) - log q(a) = 0, and d log q(a) = 1 - q = 0.5


def test_the_traces_are_checked_without_a_plate():
    def latent():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    model_trace, guide_trace = importance_traces(Programs(latent, latent), nesting=math.inf)
    assert set(model_trace.nodes) == set(guide_trace.nodes)
