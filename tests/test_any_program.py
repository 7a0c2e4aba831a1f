"""What "any Pyro program" means: no plates, global latents, sequential plates, sites under a condition."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger

from programs import CATEGORICAL, FLOAT, SOFT
from vma_pyro.infer import (
    RLOO,
    ExactELBO,
    MultiSampleELBO,
    ResampledELBO,
    log_weights,
    loo,
    make,
)

X = torch.tensor([0.4, -0.7, 1.1], **FLOAT)
CHOOSING = ("exact", "distinct", "distinct+wake", "priority", "unordered-set", "sum-and-sample")
SAMPLING = [name for name in CATEGORICAL if name not in (*CHOOSING, *SOFT) and not name.startswith("pyro")]

# 1. Programs without plates are one datapoint.

PRIOR = torch.tensor([0.2, 0.5, 0.3], **FLOAT)
STEP = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], **FLOAT)
MEANS = torch.tensor([-1.0, 0.3, 1.2], **FLOAT)


def hmm(x):
    """A hidden Markov model in a sequential loop, as in the tutorials."""
    state = None
    for t in pyro.markov(range(len(x))):
        probs = PRIOR if state is None else STEP[state]
        state = pyro.sample(f"state_{t}", dist.Categorical(probs))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[state], 1.0), obs=x[t])


def posterior_tables(x):
    """q(state_0), q(state_t | state_t-1), and p(x), by the backward recursion."""
    after = torch.ones(3, **FLOAT)
    tables = []
    for t in reversed(range(len(x))):
        here = torch.exp(-0.5 * (x[t] - MEANS) ** 2) / math.sqrt(2 * math.pi) * after
        step = PRIOR if t == 0 else STEP
        joint = step * here
        after = joint.sum(-1)
        tables.append(joint / after[..., None])
    return tables[::-1], after.log()


def smoothing_guide(x):
    tables, _ = posterior_tables(x)
    state = None
    for t in pyro.markov(range(len(x))):
        state = pyro.sample(f"state_{t}", dist.Categorical(tables[t] if state is None else tables[t][state]))


@pytest.mark.parametrize("name", sorted(set(SAMPLING) - {"wake-sleep", "wake-wake-defensive"}))
def test_a_hidden_markov_model_without_plates(name):
    """At the posterior every draw weighs p(x), whatever the estimator: the loss is -log p(x) by the recursion."""
    _, log_p = posterior_tables(X)
    assert make(name, 3).loss(hmm, smoothing_guide, X) == pytest.approx(-log_p.item(), rel=1e-9, abs=1e-9)


def test_its_states_summed_by_the_exact_bound():
    def guide(x):
        state = None
        for t in pyro.markov(range(len(x))):
            probs = STEP[0] if state is None else STEP.flip(0)[state]
            state = pyro.sample(f"state_{t}", dist.Categorical(probs))

    _, log_p = posterior_tables(X)
    elbo = ExactELBO(site=[f"state_{t}" for t in range(len(X))], max_plate_nesting=0)
    assert elbo.loss(hmm, guide, X) == pytest.approx(-log_p.item(), rel=1e-9)


def first_program(x):
    """The first program of every tutorial: a latent and an observation."""
    a = pyro.sample("a", dist.Categorical(PRIOR))
    pyro.sample("x", dist.Normal(MEANS[a], 1.0), obs=x[0])


@pytest.mark.parametrize("name", ["exact", "unordered-set", "sum-and-sample", "distinct"])
def test_all_values_of_a_single_site_without_plates(name):
    """With as many values as there are each is its objective by enumeration."""
    q = torch.tensor([0.3, 0.3, 0.4], **FLOAT)
    joint = PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(X[0])
    single = (q * (joint - q.log())).sum().item()
    want = single if name in ("unordered-set", "sum-and-sample") else joint.logsumexp(0).item()
    got = make(name, 3, site="a").loss(first_program, lambda x: pyro.sample("a", dist.Categorical(q)), X)
    assert got == pytest.approx(-want, rel=1e-9)


# 2. Latents that all datapoints share.


def bayesian_mixture(x, q=None, size=None):
    """A weight of all, and an assignment of each; with q: the guide."""
    w = pyro.sample("w", dist.Bernoulli(torch.tensor(0.3, **FLOAT) if q is None else q))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        prior = torch.stack([0.2 + 0.6 * w, 0.8 - 0.6 * w], -1)
        probs = prior if q is None else torch.tensor([0.5, 0.5], **FLOAT)
        a = pyro.sample("a", dist.Categorical(probs))
        if q is None:
            pyro.sample("x", dist.Normal(MEANS[a], 1.0), obs=x[rows])


def mixture_outcomes(q):
    """log q and log w of all outcomes (w, a_1, a_2, a_3), by hand."""
    table = []
    for w, *a in itertools.product((0, 1), repeat=4):
        log_q = math.log(q if w else 1 - q) + 3 * math.log(0.5)
        log_p = math.log(0.3 if w else 0.7)
        for value, one in zip(X, a, strict=True):
            log_p += math.log((0.2 + 0.6 * w) if one == 0 else (0.8 - 0.6 * w))
            log_p += dist.Normal(MEANS[one], 1.0).log_prob(value).item()
        table.append((log_q, log_p - log_q))
    return torch.tensor(table, **FLOAT).T


def test_a_global_latent_makes_the_data_set_one_datapoint():
    """Every weight is that of an outcome of the enumeration, and E log w is the enumerated one (|z| < 4.5)."""
    q = torch.tensor(0.6, **FLOAT)
    with pytest.raises(ValueError, match=r"site 'w': .*batch_plates=\(\) gives the whole data set one weight"):
        make("vimco", 2).loss(bayesian_mixture, lambda x: bayesian_mixture(x, q), X)
    torch.manual_seed(0)
    guide = lambda x: bayesian_mixture(x, q)  # noqa: E731
    log_w = log_weights(bayesian_mixture, guide, (X,), num_particles=4000, batch_plates=())
    assert log_w.shape == (4000, 1)
    log_q, exact = mixture_outcomes(0.6)
    assert (log_w[:50] - exact).abs().min(1).values.max() < 1e-9
    error = log_w.std() / len(log_w) ** 0.5
    assert abs(log_w.mean() - (log_q.exp() * exact).sum()) < 4.5 * error


class InTurn(Messenger):
    """Decides the values of sites, particle by particle."""

    def __init__(self, outcomes):
        super().__init__()
        self.outcomes, self.run = list(outcomes), -1

    def __enter__(self):
        self.run += 1
        return super().__enter__()

    def _pyro_sample(self, msg):
        if msg["name"] in self.outcomes[self.run] and not msg["is_observed"]:
            msg["value"] = torch.full(msg["fn"].batch_shape, self.outcomes[self.run][msg["name"]], **FLOAT)


@pytest.mark.parametrize("name", ["vimco", "loo", "rloo"])
def test_the_gradient_of_a_global_latent(name):
    """Sum over all pairs of outcomes of probability times gradient, against the enumerated objective."""
    q = torch.tensor(0.6, **FLOAT, requires_grad=True)

    def model(x):
        w = pyro.sample("w", dist.Bernoulli(torch.tensor(0.3, **FLOAT)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2 * w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Bernoulli(q))

    log_p = torch.stack([math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(X).sum(),
                         math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(X).sum()])  # fmt: skip
    log_q = torch.stack([1 - q, q]).log()
    pairs = torch.tensor(list(itertools.product(range(2), repeat=2)))
    log_w = (log_p - log_q)[pairs]
    objective = log_w.mean(1) if name == "rloo" else log_w.logsumexp(1) - math.log(2)
    (want,) = torch.autograd.grad(-(log_q[pairs].sum(1).exp() * objective).sum(), q)
    elbo = make(name, 2, batch_plates=())
    elbo.vectorize_particles = False
    got = 0.0
    for pair in pairs:
        decided = InTurn({"w": float(v)} for v in pair)
        (g,) = torch.autograd.grad(elbo.differentiable_loss(model, decided(guide), X), q)
        got = got + log_q.detach()[pair].sum().exp() * g
    torch.testing.assert_close(got, want)


def test_a_subsample_must_not_stand_inside_the_logarithm():
    q = torch.tensor(0.6, **FLOAT)
    pair = (lambda x: bayesian_mixture(x, size=2)), (lambda x: bayesian_mixture(x, q, size=2))
    for elbo in (make("vimco", 2, batch_plates=()), make("wake-wake", 2, batch_plates=())):
        with pytest.raises(ValueError, match="expected all 3 elements of plate 'data', .* got a subsample of 2"):
            elbo.loss(*pair, X)
    torch.manual_seed(0)
    log_q, log_w = mixture_outcomes(0.6)
    elbo = RLOO(2, batch_plates=(), max_plate_nesting=1)  # linear in log w: unbiased
    losses = torch.tensor([elbo.loss(*pair, X) for _ in range(300)])
    assert abs(losses.mean() + (log_q.exp() * log_w).sum()) < 4.5 * losses.std() / len(losses) ** 0.5


# 3. Names and kinds of plates.


def in_plate(name, x, guide=False):
    with pyro.plate(name, len(x)):
        a = pyro.sample("a", dist.Categorical(PRIOR))
        if not guide:
            pyro.sample("x", dist.Normal(MEANS[a], 1.0), obs=x)


@pytest.mark.parametrize("name", sorted(set(SAMPLING) | {"exact"}))
def test_a_plate_of_another_name(name):
    pair = (lambda x: in_plate("batch", x)), (lambda x: in_plate("batch", x, guide=True))
    with pytest.raises(ValueError, match=r"found in \['batch'\].* batch_plates=\('batch',\) names") as error:
        make(name, 2, site="a").loss(*pair, X)
    assert "\n" not in str(error.value)
    torch.manual_seed(0)
    renamed = make(name, 2, site="a", batch_plates=("batch",)).loss(*pair, X)
    torch.manual_seed(0)
    assert renamed == make(name, 2, site="a").loss(
        lambda x: in_plate("data", x), lambda x: in_plate("data", x, guide=True), X
    )


def test_sequential_plates_are_one_datapoint_together():
    """At the posterior of each element every weight is p(x)."""
    joint = PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(X[:, None])  # [N, 3]

    def model(x):
        for i in pyro.plate("data", len(x)):
            a = pyro.sample(f"a_{i}", dist.Categorical(PRIOR))
            pyro.sample(f"x_{i}", dist.Normal(MEANS[a], 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"a_{i}", dist.Categorical(logits=joint[i]))

    with pytest.raises(ValueError, match=r"sequential plates \['data'\].*batch_plates=\(\)"):
        make("vimco", 2).loss(model, guide, X)
    for name in ("vimco", "rloo", "loo+dreg", "vimco+resampled", "tvo"):
        loss = make(name, 3, batch_plates=()).loss(model, guide, X)
        assert loss == pytest.approx(-joint.logsumexp(1).sum().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["reinforce", "vimco", "rloo", "wake-wake", "exact"])
def test_two_plates_with_one_announced(name):
    def program(x, guide=False):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            if not guide:
                pyro.sample("x", dist.Normal(a, 1.0), obs=x[:, None])

    with pytest.raises(ValueError, match="max_plate_nesting: expected at least 2, as plate 'data'") as error:
        make(name, 2, site="a").loss(program, lambda x: program(x, guide=True), X.float())
    assert "\n" not in str(error.value)


# 4. Dimensions that no plate declares.


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_data_of_a_wider_shape_are_refused(vectorize, K):
    """[N, 1] against [N]; with K = N the wrong dimension has the particles' own size."""
    pair = (lambda x: in_plate("data", x)), (lambda x: in_plate("data", x, guide=True))
    elbo = RLOO(max(K, 2), vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.num_particles = K
    wide = X[:, None]
    with pytest.raises(ValueError, match="site 'x': expected one log probability per element of its plates, got"):
        elbo.loss(*pair, wide)
    with pytest.raises(ValueError, match="site 'x': expected one log probability per element of its plates, got"):
        log_weights(*pair, (wide,), num_particles=K)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("nesting", [1, 2])
def test_a_latent_without_to_event_is_refused(K, nesting):
    """[4, N] latents, in one plate of one or two announced dimensions, also with K = 4 particles."""

    def program(x, guide=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, len(x), **FLOAT), 1.0))
            if not guide:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for elbo in (MultiSampleELBO(K, baseline=lambda w: 0 * w, max_plate_nesting=nesting),):
        with pytest.raises(
            ValueError, match="site 'z': expected one log probability .* whose dimension -2 of size 4"
        ):
            elbo.differentiable_loss(program, lambda x: program(x, guide=True), X)


@pytest.mark.parametrize("nesting", [1, None])
@pytest.mark.parametrize("name", ["vimco", "rloo", "vimco+dreg", "wake-wake", "pyro-graph", "vimco+resampled"])
def test_a_guide_without_squeeze_is_refused(name, nesting):
    """A network's [N, 1] for [N], under a prior without dimensions, with as many particles as datapoints."""
    network = torch.nn.Linear(1, 1)

    def program(x, guide=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(network(x[:, None]), 0.5) if guide else dist.Normal(0.0, 1.0))
            if not guide:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    elbo = make(name, len(X), max_plate_nesting=nesting)
    with pytest.raises(ValueError, match="site 'z': expected one log probability per element") as error:
        elbo.loss(program, lambda x: program(x, guide=True), X.float())
    assert "\n" not in str(error.value)


# 5. Sites under a condition.

PARAMETERS = {"a": -0.2, "b": 0.7, "c": -0.4}


def branches(p, both, guide=False):
    """A site b where a = 1; where a = 0 another, c, or none."""
    logit = (lambda n: p[n].expand(1)) if guide else (lambda n: torch.full((1,), 0.3, **FLOAT))
    with pyro.plate("data", 1):
        a = pyro.sample("a", dist.Bernoulli(logits=logit("a")))
        mean = 0.0 * a
        if a.item() == 1:
            mean = 1.0 + 2 * pyro.sample("b", dist.Bernoulli(logits=logit("b")))
        elif both:
            mean = -1.0 - 2 * pyro.sample("c", dist.Bernoulli(logits=logit("c")))
        if not guide:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=X[:1])


def outcomes_of(p, both):
    """All outcomes with log q and log w, by hand."""
    found = []
    values = {1: ("b", (0, 1)), 0: ("c", (0, 1)) if both else (None, (None,))}
    prior = torch.tensor(0.3, **FLOAT)
    log = torch.nn.functional.logsigmoid
    for a in (0, 1):
        name, choices = values[a]
        for v in choices:
            log_q, log_p = log(p["a"] if a else -p["a"]), log(prior if a else -prior)
            outcome, mean = {"a": float(a)}, 0.0
            if name is not None:
                log_q, log_p = log_q + log(p[name] if v else -p[name]), log_p + log(prior if v else -prior)
                outcome[name] = float(v)
                mean = (1.0 + 2 * v) if a else (-1.0 - 2 * v)
            log_p = log_p + dist.Normal(mean, 1.0).log_prob(X[0])
            found.append((outcome, log_q, log_p - log_q))
    return found


SEQUENTIAL = {
    "vimco": lambda: MultiSampleELBO(2, vectorize_particles=False, max_plate_nesting=1),
    "loo": lambda: MultiSampleELBO(2, baseline=loo, vectorize_particles=False, max_plate_nesting=1),
    "rloo": lambda: RLOO(2, vectorize_particles=False, max_plate_nesting=1),
    "chunks": lambda: MultiSampleELBO(2, chunk_size=1, max_plate_nesting=1),
    "resampled": lambda: ResampledELBO(2, vectorize_particles=False, max_plate_nesting=1),
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sites_under_a_condition(name, both):
    """Sum over all pairs of outcomes of probability times gradient; of `resampled`, which draws, its value."""
    p = {n: torch.tensor(v, **FLOAT, requires_grad=True) for n, v in PARAMETERS.items()}
    outcomes = outcomes_of(p, both)
    total, objective, value = dict.fromkeys(p, 0.0), 0.0, 0.0
    for pair in itertools.product(outcomes, repeat=2):
        log_w = torch.stack([o[2] for o in pair])
        probability = sum(o[1] for o in pair).exp()
        objective = objective + probability * (
            log_w.mean() if name == "rloo" else log_w.logsumexp(0) - math.log(2)
        )
        runs = [o[0] for o in pair]
        if name == "chunks":  # a first look, the particles, and the last one first in the backward pass
            runs = [runs[0], *runs, *reversed(runs)]
        guide = InTurn(runs)(lambda: branches(p, both, guide=True))
        loss = SEQUENTIAL[name]().differentiable_loss(lambda: branches(p, both), guide)
        value = value - probability.item() * loss.item()
        if name == "resampled":
            continue
        gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
        for n, g in zip(p, gradients, strict=True):
            total[n] = total[n] + (0.0 if g is None else probability.item() * g)
    assert value == pytest.approx(objective.item(), rel=1e-10)
    if name != "resampled":
        want = torch.autograd.grad(-objective, list(p.values()), allow_unused=True)
        for n, g in zip(p, want, strict=True):
            assert float(total[n]) == pytest.approx(0.0 if g is None else g.item(), rel=1e-9, abs=1e-12), n


def test_all_particles_at_once_cannot_look_at_single_values():
    p = {n: torch.tensor(v, **FLOAT) for n, v in PARAMETERS.items()}
    with pytest.raises(
        ValueError, match="vectorize_particles: expected False for a program that looks at"
    ) as error:
        make("vimco", 2).loss(lambda: branches(p, True), lambda: branches(p, True, guide=True))
    assert "\n" not in str(error.value)


def test_each_of_several_datapoints_needs_the_same_sites_to_resample():
    elbo = ResampledELBO(2, vectorize_particles=False, max_plate_nesting=1)
    turns = iter([True, True, False, False])

    def program(of_guide):
        with_b = next(turns)
        with pyro.plate("data", 2):
            a = pyro.sample("a", dist.Bernoulli(torch.full((2,), 0.5)))
            if with_b:
                a = a + pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)))
            if not of_guide:
                pyro.sample("x", dist.Normal(a, 1.0), obs=X[:2].float())

    with pytest.raises(ValueError, match="site 'b': expected in all particles, as each datapoint chooses one"):
        elbo.differentiable_loss(lambda: program(False), lambda: program(True))


# 6. Programs that cannot broadcast values in a new dimension.


@pytest.mark.parametrize("name", ["exact", "distinct", "unordered-set", "sum-and-sample"])
def test_a_decoder_that_cannot_broadcast_is_told_so(name):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(PRIOR))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **FLOAT), 1.0))
            both = torch.cat([z[..., None], torch.nn.functional.one_hot(a, 3).double()], -1)
            pyro.sample("x", dist.Normal(both.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Categorical(PRIOR))
            pyro.sample("z", dist.Normal(torch.zeros(len(x), **FLOAT), 1.0))

    with pytest.raises(ValueError, match="site 'a': its values stand in a new dimension on the left") as error:
        make(name, 2, site="a").loss(model, guide, X)
    assert "\n" not in str(error.value)


def test_a_site_whose_values_differ_in_number_between_datapoints():
    def program(x, guide=False):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.4)))
            if not guide:
                pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    pair = program, lambda x: program(x, guide=True)
    for name in ("exact", "distinct", "unordered-set", "sum-and-sample"):
        with pytest.raises(
            ValueError, match="site 'a': expected a finite support, the same for all datapoints"
        ) as e:
            make(name, 2, site="a").loss(*pair, X.float())
        assert "\n" not in str(e.value)
    assert math.isfinite(make("vimco", 2).loss(*pair, X.float()))


def test_the_first_look_leaves_nothing_behind():
    """Neither noise nor the statistics of a training mode: a second call of the same programs sees the same."""
    norm = torch.nn.BatchNorm1d(1, momentum=0.5)

    class Program(torch.nn.Module):
        def __init__(self, guide):
            super().__init__()
            self.norm, self.guide = norm, guide

        def forward(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Bernoulli(torch.full((len(x),), 0.5)))
                if not self.guide:
                    pyro.sample("x", dist.Normal(self.norm(x[:, None]).squeeze(-1) + a, 1.0), obs=x)

    pair, found = (Program(False), Program(True)), []
    for _ in range(2):  # the first has a look at them, the second knows them
        norm.reset_running_stats()
        torch.manual_seed(0)
        found.append((make("vimco", 2).loss(*pair, X.float()), norm.running_mean.item()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["distinct", "priority"])
def test_advice_is_given_where_it_helps_alone(name):
    """A site in an inner plate, after a continuous latent: what the line would name refuses the plate as well."""

    def program(observe):
        with pyro.plate("data", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2, requires_grad=True)))
            with pyro.plate("words", 3, dim=-2):
                a = pyro.sample("a", dist.Categorical(logits=z[..., None] * torch.arange(4.0)))
                if observe:
                    pyro.sample("x", dist.Normal(1.0 * a, 1.0), obs=torch.zeros(3, 2))

    elbo = make(name, 2, site="a", max_plate_nesting=2)
    with pytest.raises(ValueError, match=r"^site 'a': expected in the batch plates \['data'\] alone") as error:
        elbo.differentiable_loss(lambda: program(True), lambda: program(False))
    assert "\n" not in str(error.value)
