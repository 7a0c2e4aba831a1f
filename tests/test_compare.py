"""The table of estimators: what it measures is right, on programs where the answer is known."""

import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from programs import CATEGORICAL, SUBSAMPLING, Discrete, Mixed, rows
from vma_pyro.infer import (
    ESTIMATORS,
    RLOO,
    Comparison,
    DistinctELBO,
    EnumeratedReference,
    ExactELBO,
    MultiSampleELBO,
    compare,
    dreg,
    fit_slope,
    loo,
    make,
    matched,
    parameter_groups,
    reinforce,
    vimco,
)
from vma_pyro.infer.comparison.moments import Moments

N = 6


class Program(nn.Module):
    """A program of `programs` with its parameters, shared by all datapoints, as modules have them."""

    def __init__(self, program, part, parameters):
        super().__init__()
        self.program, self.part = program, part
        self.p = nn.ParameterDict(parameters)

    def forward(self, x):
        p = {name: value.expand(len(x), *value.shape) for name, value in self.p.items()}
        return getattr(self.program, self.part)(p, x)


def mixed(size=N):
    program = Mixed()
    values = {n: nn.Parameter(v) for n, v in program.values.items()}
    model = Program(program, "model", {"entries": values["entries"]})
    guide = Program(program, "guide", {n: values[n] for n in ("address", "loc", "log_scale")})
    return model, guide, (torch.full((size,), 0.7, dtype=torch.float64),)


def discrete():
    program = Discrete()
    values = {n: nn.Parameter(v) for n, v in program.values.items()}
    model = Program(program, "model", {n: values[n] for n in ("prior_a", "prior_b", "mean")})
    guide = Program(program, "guide", {n: values[n] for n in ("guide_a", "guide_b")})
    return model, guide, (torch.tensor([0, 1, 0, 2]),)


def test_parameters_are_grouped_by_what_they_are_in():
    model, guide, args = mixed()
    groups = parameter_groups(model, guide, args)
    assert [sum(p is q for q in groups["discrete guide"]) for p in [guide.p["address"]]] == [1]
    assert {id(p) for p in groups["continuous guide"]} == {id(guide.p["loc"]), id(guide.p["log_scale"])}
    assert [id(p) for p in groups["model"]] == [id(model.p["entries"])]
    assert "shared" not in groups


def test_a_parameter_of_both_programs_is_shared():
    model, guide, args = mixed()
    guide.p["loc"] = model.p["entries"]
    groups = parameter_groups(model, guide, args)
    assert [id(p) for p in groups["shared"]] == [id(model.p["entries"])]


def test_parameters_of_the_store_are_found():
    pyro.settings.set(module_local_params=False)
    x = torch.randn(4)

    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(pyro.param("mean", torch.tensor(1.0)) * a, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("a", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))

    groups = parameter_groups(model, guide)
    assert {name: len(group) for name, group in groups.items()} == {"discrete guide": 1, "model": 1}
    estimators = {"vimco": MultiSampleELBO(2, max_plate_nesting=1)}
    table = compare(model, guide, estimators=estimators, draws=50, show_progress=False)
    assert table.of("vimco", "discrete guide").reference == "exact, by enumeration"


def test_biased_and_unbiased_are_told_apart_by_the_enumerated_gradient():
    model, guide, args = discrete()
    pyro.enable_validation(False)
    names = ["vimco", "ovis", "rloo", "pyro-graph"]
    estimators = {name: make(name, 3, site="a") for name in names}
    table = compare(model, guide, args, estimators=estimators, draws=150, show_progress=False)
    for name in names:
        row = table.of(name, "discrete guide")
        assert row.reference == "exact, by enumeration"
        assert row.evaluations == 3
        if ESTIMATORS[name](3, "a", 1).unbiased:
            assert row.bias_z < 4.5, row
            assert row.cosine > 0.9, row
        else:
            assert row.bias_z > 6, row


def test_figures_agree_with_a_plain_computation():
    """150 draws of 600 datapoints, whose variance is known to 8 % each time: to 30 %."""
    model, guide, args = mixed(600)
    pyro.enable_validation(False)
    elbo = MultiSampleELBO(2, baseline=loo, max_plate_nesting=1)
    table = compare(
        model, guide, args, estimators={"loo": elbo}, draws=150, reference_draws=30, show_progress=False
    )
    row = table.of("loo", "discrete guide")
    torch.manual_seed(7)
    parameter = guide.p["address"]
    gradients = torch.stack(
        [torch.autograd.grad(elbo.differentiable_loss(model, guide, *args), parameter)[0] for _ in range(150)]
    )
    variance, square = gradients.var(0).sum(), gradients.mean(0).square().sum()
    assert row.relative_variance == pytest.approx((variance / square).item(), rel=0.3)
    assert row.snr == pytest.approx((square / variance).sqrt().item(), rel=0.2)
    assert row.bias_z < 4.5
    assert row.reference == "discrete sites enumerated"
    assert 1 <= row.effective_samples <= 2
    assert row.variance_time == pytest.approx(row.relative_variance * row.milliseconds)


def test_every_estimator_fits_in_one_table():
    model, guide, args = mixed()
    estimators = {name: make(name, 3, site="a") for name in CATEGORICAL}
    table = compare(model, guide, args, estimators=estimators, draws=3, warm_up=2, show_progress=False)
    assert {row.estimator for row in table.rows} == set(CATEGORICAL)
    assert {row.group for row in table.rows} == {"discrete guide", "continuous guide", "model"}
    content = json.loads(table.to_json())
    assert len(content["rows"]) == 3 * len(CATEGORICAL)
    assert table.to_markdown().count("| vimco |") == 3
    evaluations = {row.estimator: row.evaluations for row in table.rows}
    assert evaluations["vimco"] == 3
    assert evaluations["vimco+2z"] == 6
    assert evaluations["ovis-mc"] == 4
    assert evaluations["vimco+chunks"] == pytest.approx(4)  # the backward pass runs the model forward once more
    assert evaluations["exact"] == 3
    assert evaluations["pyro-enum"] == 3


def test_what_claims_to_be_unbiased_is_held_to_its_own_objective():
    model, guide, args = mixed()
    pyro.enable_validation(False)
    names = ["distinct", "vimco+common", "vimco+2z", "unordered-set", "wake-wake"]
    estimators = {name: make(name, 2, site="a") for name in names}
    options = {"draws": 60, "reference_draws": 80, "show_progress": False}
    table = compare(model, guide, args, estimators=estimators, **options)
    for name in names:
        row = table.of(name, "continuous guide")
        if row.claims_unbiased:
            assert row.bias_z < 4.5, row
        else:
            assert row.bias_z > 5, row
            assert row.relative_variance == pytest.approx(row.snr**-2)


def test_budgets_are_matched_on_runs_of_the_model():
    model, guide, args = mixed()
    names = ["vimco", "vimco+2z", "ovis-mc", "pyro-enum"]
    found = matched(names, lambda name, k: make(name, k, site="a"), 4, model, guide, args)
    assert {name: elbo.num_particles for name, elbo in found.items()} == {
        "vimco": 4,
        "vimco+2z": 2,
        "ovis-mc": 3,
        "pyro-enum": 1,
    }


def near_posterior(count):
    """A mixture whose guide is the posterior but for a small step; one row of parameters per draw."""
    generator = torch.Generator().manual_seed(0)
    size, wide = 4, {"generator": generator, "dtype": torch.float64}
    logits = torch.randn(size, **wide)
    values = {"address": logits + 0.2 * torch.randn(size, **wide), "loc": 0.8 + 0.15 * torch.randn(size, **wide)}

    def model(p):
        with pyro.plate("data", count):
            pyro.sample("a", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.ones(count, dtype=torch.float64))

    def guide(p):
        with pyro.plate("data", count):
            a = pyro.sample("a", dist.Categorical(logits=p["address"]))
            pyro.sample("z", dist.Normal(p["loc"][torch.arange(count), a], 0.2**0.5))

    return model, guide, rows(values, count)


def signal_to_noise(elbo, draws):
    """Of each parameter, over independent draws; corrected for the noise of the mean."""
    model, guide, p = near_posterior(draws)
    gradients = torch.autograd.grad(elbo.differentiable_loss(model, guide, p), list(p.values()))
    found = {}
    for name, g in zip(p, gradients, strict=True):
        variance = g.var(0).sum()
        found[name] = ((g.mean(0).square().sum() - variance / draws).clamp(min=0) / variance).sqrt().item()
    return found


def test_slopes_of_the_signal_to_noise_ratio_near_the_posterior():
    """loo and dreg gain like sqrt(K); vimco and iwae lose like 1 / sqrt(K). K = 4 ... 64."""
    pyro.enable_validation(False)
    Ks, found = [4, 16, 64], {"vimco": [], "loo": [], "iwae": [], "dreg": []}
    for K in Ks:
        slow = signal_to_noise(MultiSampleELBO(K, baseline=vimco, max_plate_nesting=1), 60_000)
        fast = signal_to_noise(MultiSampleELBO(K, baseline=loo, pathwise=dreg, max_plate_nesting=1), 20_000)
        for name, value in (("vimco", slow["address"]), ("iwae", slow["loc"])):
            found[name].append(value)
        for name, value in (("loo", fast["address"]), ("dreg", fast["loc"])):
            found[name].append(value)
    slopes = {name: fit_slope(Ks, values) for name, values in found.items()}
    for name, expected in (("loo", 0.5), ("dreg", 0.5), ("vimco", -0.5), ("iwae", -0.5)):
        assert abs(slopes[name] - expected) < 0.15, (slopes, found)


def test_fit_slope_and_bad_input():
    assert fit_slope([2, 4, 8], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="snr: expected finite values above 0"):
        fit_slope([2, 4], [1.0, math.nan])
    with pytest.raises(ValueError, match="snr: expected at least 2 values"):
        fit_slope([2], [1.0])
    model, guide, args = mixed()
    with pytest.raises(ValueError, match="draws: expected at least 2, got 1"):
        compare(model, guide, args, estimators={"a": MultiSampleELBO(2)}, draws=1)
    with pytest.raises(ValueError, match="estimators: expected at least one, got none"):
        compare(model, guide, args, estimators={})
    estimators = {"a": MultiSampleELBO(2, baseline=reinforce, max_plate_nesting=1)}
    table = compare(model, guide, args, estimators=estimators, draws=2, show_progress=False)
    with pytest.raises(KeyError, match="no row"):
        table.of("b", "model")


# References.


def summed(objective, log_w, log_q, k):
    """The objective of each datapoint [N] from all outcomes [N, O], in plain torch."""
    if objective == "elbo":
        return (log_q.exp() * log_w).sum(-1)
    if objective == "exact":
        return (log_q + log_w).logsumexp(-1)
    if objective == "iwae":
        first, second = log_w[:, :, None], log_w[:, None, :]
        probability = (log_q[:, :, None] + log_q[:, None, :]).exp()
        return (probability * (torch.logaddexp(first, second) - math.log(2))).sum((1, 2))
    value = 0.0
    order = log_q[0].argsort(descending=True)
    top, others = order[: k - 1], order[k - 1 :]
    rest = log_q[:, others].logsumexp(-1)
    for a in others:
        terms = torch.cat([(log_q + log_w)[:, top], (rest + log_w[:, a])[:, None]], 1)
        value = value + (log_q[:, a] - rest).exp() * terms.logsumexp(-1)
    return value


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(
    ("objective", "by_value"),
    [("iwae", False), ("iwae", True), ("elbo", False), ("elbo", True), ("exact", False), ("distinct", False)],
)
def test_enumerated_references_by_hand(objective, by_value, kind):
    """With masks, a scale and a subsampled plate; two sites wherever the objective takes two."""
    program = Discrete(two_sites=objective != "distinct")
    kinds = torch.tensor([kind])
    sites = ["a", "b"] if program.two_sites else ["a"]
    k = 3 if objective == "distinct" else 2
    options = {"objective": objective, "by_value": by_value, "max_plate_nesting": 1}
    elbo = EnumeratedReference(1 if objective == "exact" else k, sites=sites, **options)
    p, q = rows(program.values, 1), rows(program.values, 1)
    loss = elbo.differentiable_loss(program.model, program.guide, p, kinds)
    log_w, log_q = program.tables(q, kinds)
    want = -SUBSAMPLING * summed(objective, log_w, log_q, k).sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10, abs=1e-10)
    if kind == 2:  # masked entirely: nothing to differentiate
        return
    got = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    wanted = torch.autograd.grad(want, list(q.values()), allow_unused=True)
    for name, a, b in zip(p, got, wanted, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert (a - b).abs().max() < 1e-10, name


def ordinary_decoder(masked):
    """A decoder that puts z and one_hot(a) side by side, and so takes no new dimension of a alone."""

    def model(x, logits, loc, mean):
        with pyro.plate("data", len(x)):
            prior = dist.Categorical(logits=torch.zeros(len(x), 3))
            a = pyro.sample("a", prior.mask(torch.ones(len(x), dtype=torch.bool)) if masked else prior)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            hidden = torch.cat([z[..., None], torch.nn.functional.one_hot(a, 3).float()], -1)
            pyro.sample("x", dist.Normal(hidden @ mean, 1.0), obs=x)

    def guide(x, logits, loc, mean):
        with pyro.plate("data", len(x)):
            q = dist.Categorical(logits=logits)
            pyro.sample("a", q.mask(torch.ones(len(x), dtype=torch.bool)) if masked else q)
            pyro.sample("z", dist.Normal(loc, 1.0))

    generator = torch.Generator().manual_seed(4)
    parameters = [torch.randn(s, generator=generator, requires_grad=True) for s in ((5, 3), (5,), (4,))]
    groups = dict(zip(("discrete guide", "continuous guide", "model"), ([p] for p in parameters), strict=True))
    return model, guide, (torch.randn(5, generator=generator), *parameters), groups


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_that_takes_no_new_dimension_is_enumerated_value_by_value(masked):
    """Unbiased: |z| < 4.5 of 30 draws, in three groups."""
    model, guide, args, groups = ordinary_decoder(masked)
    estimators = {
        name: make(name, 2, site="a") for name in (["vimco"] if masked else ["vimco", "rloo", "vimco+2z"])
    }
    options = {"groups": groups, "draws": 30, "reference_draws": 40, "show_progress": False}
    table = compare(model, guide, args, estimators=estimators, **options)
    for row in table.rows:
        assert row.reference == "discrete sites enumerated, value by value"
        assert 0 < row.reference_error < 1
        assert row.bias_z < 4.5, row
    page = table.to_markdown()
    assert "1. discrete sites enumerated, value by value" in page
    assert " | 1 (±" in page


def counting(x, q):
    count = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with pyro.plate("data", 4):
        c = pyro.sample("c", dist.Binomial(count, torch.full((4,), 0.4)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def counted(x, q):
    with pyro.plate("data", 4):
        pyro.sample("c", dist.Binomial(torch.tensor([1.0, 2.0, 3.0, 4.0]), logits=q))


def numbers(x, q):
    with pyro.plate("data", 4):
        c = pyro.sample("c", dist.Poisson(torch.ones(4)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def numbered(x, q):
    with pyro.plate("data", 4):
        pyro.sample("c", dist.Poisson(q.exp()))


@pytest.mark.parametrize(
    ("programs", "why"),
    [
        ((counting, counted), "site 'c' has a support that differs between datapoints"),
        ((numbers, numbered), "site 'c' has no finite support (Poisson)"),
    ],
)
def test_what_cannot_be_enumerated_is_held_to_a_long_run_and_says_so(programs, why):
    q = torch.zeros(4, requires_grad=True)
    options = {"groups": {"guide": [q]}, "draws": 6, "show_progress": False}
    estimators = {"vimco": make("vimco", 2), "loo": make("loo", 2), "rloo": make("rloo", 2)}
    table = compare(*programs, (torch.ones(4), q), estimators=estimators, **options)
    assert table.of("vimco", "guide").reference == f"a long run of loo, K = 2 (not enumerated: {why})"
    assert table.of("loo", "guide").reference == f"a long run of vimco, K = 2 (not enumerated: {why})"
    assert table.of("rloo", "guide").reference == f"a longer run of itself (not enumerated: {why})"
    with pytest.raises(ValueError, match="^reference: expected discrete sites that can be enumerated") as error:
        compare(*programs, (torch.ones(4), q), estimators=estimators, reference="enumeration", **options)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_the_caller_names_the_reference():
    model, guide, args = discrete()
    options = {"estimators": {"vimco": make("vimco", 3, site="a")}, "draws": 8, "show_progress": False}

    def reference(which):
        return compare(model, guide, args, reference=which, **options).of("vimco", "discrete guide")

    assert reference("enumeration").reference == "exact, by enumeration"
    assert reference("long run").reference == "a long run of loo, K = 3"
    own = reference(MultiSampleELBO(3, baseline=reinforce, max_plate_nesting=1))
    assert own.reference == "a long run of MultiSampleELBO (reinforce, iwae), K = 3"
    other = reference(RLOO(8, max_plate_nesting=1))  # of another objective: lengths are not comparable
    assert other.relative_variance == pytest.approx(other.snr**-2)
    with pytest.raises(
        ValueError, match="^reference: expected None, 'enumeration', 'long run' or an objective, got"
    ):
        reference("best")
    with pytest.raises(
        ValueError, match="^reference: expected an objective that runs on these programs, got site 'b'"
    ):
        reference(ExactELBO(site="a", max_plate_nesting=1))


class Overstated(DistinctELBO):
    """With twice the score part, which it calls unbiased."""

    @staticmethod
    def _score_part(*args):
        return 2 * DistinctELBO._score_part(*args)


def test_objectives_of_their_own_are_held_to_finite_sums_and_not_to_themselves():
    """An estimator with a wrong part repeats itself faithfully; the sum over the values finds it. |z| < 4.5."""
    program = Discrete(two_sites=False, plain=True)
    values = {n: nn.Parameter(v) for n, v in program.values.items()}
    model = Program(program, "model", {n: values[n] for n in ("prior_a", "prior_b", "mean")})
    guide = Program(program, "guide", {"guide_a": values["guide_a"]})
    args = (torch.zeros(N, dtype=torch.long),)
    pyro.enable_validation(False)
    estimators = {name: make(name, 3, site="a") for name in ("distinct", "exact")}
    estimators["overstated"] = Overstated(3, site="a", max_plate_nesting=1)
    table = compare(model, guide, args, estimators=estimators, draws=120, show_progress=False)
    for row in table.rows:
        assert row.reference == "exact, by enumeration"
        assert row.reference_error == 0
        if row.estimator != "overstated" and not math.isnan(row.bias_z):
            assert row.bias_z < 4.5, row
    assert table.of("overstated", "discrete guide").bias_z > 6


@pytest.mark.parametrize(("name", "options"), [("vimco+common", {"noise": "common"}), ("vimco+2z", {})])
@pytest.mark.parametrize("by_value", [False, True])
def test_coupled_objectives_are_enumerated_with_their_draws(name, options, by_value):
    """20,000 trials, one a row: |z| < 4.5, and > 5 from the bound of independent particles."""
    program, count = Mixed(), 20_000
    pyro.enable_validation(False)
    elbo = make(name, 2, site="a")
    options = {**options, "draws_per_score": elbo.draws_per_score, "by_value": by_value, "max_plate_nesting": 1}

    def gradients(objective):
        p = rows(program.values, count)
        loss = objective.differentiable_loss(program.model, program.guide, p, program.x.expand(count))
        return torch.cat(torch.autograd.grad(loss, list(p.values())), 1)

    def z_scores(got, want):
        spread = ((got.var(0) + want.var(0)) / count).sqrt()
        return ((got.mean(0) - want.mean(0)) / spread).abs().max()

    got = gradients(elbo)
    own = EnumeratedReference(2, sites=["a"], objective="iwae-coupled", **options)
    assert z_scores(got, gradients(own)) < 4.5
    independent = EnumeratedReference(2, sites=["a"], by_value=by_value, max_plate_nesting=1)
    assert z_scores(got, gradients(independent)) > 5


# Figures.


@pytest.mark.parametrize(("size", "noise"), [(2, 0.3), (5, 2.0)])
def test_the_directional_ratio_is_that_of_mean_squares(size, noise):
    """Gaussian gradients: E g_par^2 = |mu|^2 + s^2, E g_perp^2 = (d - 1) s^2. 4000 draws, to 6 %."""
    generator = torch.Generator().manual_seed(5)
    mu = torch.randn(size, generator=generator, dtype=torch.float64)
    moments = Moments(size, torch.nn.functional.normalize(mu, dim=0)[None])
    for _ in range(4000):
        moments.add(mu + noise * torch.randn(size, generator=generator, dtype=torch.float64))
    want = math.sqrt((mu.square().sum().item() + noise**2) / ((size - 1) * noise**2))
    assert moments.directional_snr(0.0) == pytest.approx(want, rel=0.06)


def test_a_reference_that_was_sampled_does_not_lower_the_directional_ratio():
    """A direction that is off by an angle of 0.2, and says so. 4000 draws, to 6 %."""
    generator = torch.Generator().manual_seed(5)
    angle, noise = math.atan(0.2), 0.05
    moments = Moments(2, torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64))
    for _ in range(4000):
        g = torch.tensor([1.0, 0.0]) + noise * torch.randn(2, generator=generator)
        moments.add(g.double())
    assert moments.directional_snr(0.0) < 5.1
    assert moments.directional_snr(0.2) == pytest.approx(1 / noise, rel=0.06)


def test_what_is_undefined_is_a_dash_and_survives_json():
    """exact trains no q(a): zero gradient. A single parameter has no direction; one particle no effective size."""
    model, guide, args = mixed()
    pyro.enable_validation(False)
    estimators = {name: make(name, 3, site="a") for name in ("exact", "vimco", "loo")}
    estimators["one"] = MultiSampleELBO(1, baseline=reinforce, max_plate_nesting=1)
    single = nn.Parameter(torch.zeros((), dtype=torch.float64))
    guide.p["address"].data = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    original = guide.forward
    guide.forward = lambda x: original(x + 0 * single)
    model.register_parameter("shift", single)
    plain = model.forward
    model.forward = lambda x: plain(x + single)
    groups = {**parameter_groups(model, guide, args), "single": [single]}
    table = compare(model, guide, args, estimators=estimators, groups=groups, draws=6, show_progress=False)
    row = table.of("exact", "discrete guide")
    undefined = ("bias_z", "relative_variance", "snr", "directional_snr", "cosine", "effective_samples")
    for name in undefined:
        assert math.isnan(getattr(row, name)), name
    assert math.isnan(table.of("vimco", "single").directional_snr)
    assert table.of("vimco", "single").snr > 0
    assert math.isnan(table.of("one", "model").effective_samples)
    assert table.of("vimco", "model").effective_samples == table.of("loo", "discrete guide").effective_samples
    plain_row = next(
        r for r in table.plain()["rows"] if r["estimator"] == "exact" and r["group"] == "discrete guide"
    )
    assert [plain_row[name] for name in undefined] == [None] * len(undefined)
    again = Comparison.of_plain(json.loads(table.to_json()))
    assert again.to_markdown() == table.to_markdown()
    line = next(line for line in table.to_markdown().splitlines() if line.startswith("| exact |"))
    assert line.count("| - ") == 7  # these and variance x time


def test_effective_samples_are_a_mean_over_many_draws():
    """Two particles of a discrete program, by enumeration; 60 draws of 500 datapoints, to 2 %."""
    model, guide, args = discrete()
    args = (torch.zeros(500, dtype=torch.long),)
    program = Discrete()
    log_w, log_q = program.tables(rows(program.values, 1), torch.tensor([0]))
    w, q = log_w[0].exp(), log_q[0].exp()
    first, second = w[:, None], w[None, :]
    want = (q[:, None] * q[None, :] * (first + second) ** 2 / (first**2 + second**2)).sum().item()
    estimators = {"vimco": make("vimco", 2, site="a")}
    table = compare(model, guide, args, estimators=estimators, draws=60, show_progress=False)
    assert table.of("vimco", "model").effective_samples == pytest.approx(want, rel=0.02)


def test_committed_tables_can_be_read():
    """Of before there was an error of the reference."""
    path = Path(__file__).parents[1] / "experiments" / "results" / "estimators.json"
    for stage in json.loads(path.read_text())["stages"]:
        table = Comparison.of_plain(stage["table"])
        assert "### discrete guide" in table.to_markdown()


# Programs of other shapes.


def hidden_markov(x, transition, emission, _):
    state = pyro.sample("s0", dist.Categorical(logits=torch.zeros(2)))
    for t, value in enumerate(x):
        if t:
            state = pyro.sample(f"s{t}", dist.Categorical(logits=transition[state]))
        pyro.sample(f"x{t}", dist.Normal(emission[state], 1.0), obs=value)


def states(x, transition, emission, logits):
    for t in range(len(x)):
        pyro.sample(f"s{t}", dist.Categorical(logits=logits[t]))


def clusters(x, loc, logits, scale):
    center = pyro.sample("center", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(center * a, scale.exp()), obs=x)


def clustering(x, loc, logits, scale):
    pyro.sample("center", dist.Normal(loc, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Bernoulli(logits=logits))


def test_a_hidden_markov_model_without_a_plate():
    """Eight paths, all enumerated; the gradient of the single-sample bound also by hand. |z| < 4.5."""
    x = torch.tensor([0.3, 1.2, -0.5])
    generator = torch.Generator().manual_seed(6)
    p = [torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 2), (2,), (3, 2))]
    groups = {"model": p[:2], "guide": p[2:]}
    options = {"batch_plates": (), "max_plate_nesting": 0, "site": "s0"}
    estimators = {name: make(name, 2, **options) for name in ("vimco", "rloo", "pyro-graph", "pyro-enum")}
    table = compare(
        hidden_markov,
        states,
        (x, *p),
        estimators=estimators,
        groups=groups,
        draws=30,
        batch_plates=(),
        show_progress=False,
    )
    for row in table.rows:
        assert row.reference == "exact, by enumeration"
        assert row.bias_z < 4.5, row
    elbo = EnumeratedReference(1, sites=["s0", "s1", "s2"], objective="elbo", max_plate_nesting=0, batch_plates=())
    got = torch.autograd.grad(elbo.differentiable_loss(hidden_markov, states, x, *p), p)
    bound = 0.0
    for path in range(8):
        s = [path >> t & 1 for t in range(3)]
        log_q = sum(p[2][t].log_softmax(-1)[s[t]] for t in range(3))
        log_p = math.log(0.5) + sum(p[0][s[t]].log_softmax(-1)[s[t + 1]] for t in range(2))
        log_p = log_p + sum(dist.Normal(p[1][s[t]], 1.0).log_prob(x[t]) for t in range(3))
        bound = bound + log_q.exp() * (log_p - log_q)
    for a, b in zip(got, torch.autograd.grad(-bound, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_latent_that_all_datapoints_share():
    """The whole data set is one datapoint, and its discrete sites are too many to sum: a long run."""
    x = torch.tensor([0.3, 1.2, -0.5, 0.7])
    p = [
        torch.tensor(0.2, requires_grad=True),
        torch.zeros(4, requires_grad=True),
        torch.tensor(0.1, requires_grad=True),
    ]
    table = compare(
        clusters,
        clustering,
        (x, *p),
        estimators={name: make(name, 2, site="a", batch_plates=()) for name in ("vimco", "pyro-graph")},
        groups={"continuous guide": p[:1], "discrete guide": p[1:2], "model": p[2:]},
        draws=15,
        batch_plates=(),
        show_progress=False,
    )
    why = "(not enumerated: site 'a' has many values per datapoint, in plate 'data')"
    for row in table.rows:
        assert row.reference.endswith(why)
        assert row.bias_z < 4.5, row


def test_estimators_with_other_plates_are_refused():
    model, guide, args = mixed()
    estimators = {"vimco": make("vimco", 2, batch_plates=("images",))}
    with pytest.raises(
        ValueError, match=r"^batch_plates: expected \['images'\], as estimator 'vimco' has, got \['data'\]"
    ):
        compare(model, guide, args, estimators=estimators)
