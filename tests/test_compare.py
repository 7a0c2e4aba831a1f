"""The table of estimators: what it measures is right, on programs where the answer is known."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Discrete, Mixed, rows
from torch import nn

from vma_pyro.infer import (
    ESTIMATORS,
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


def mixed():
    program = Mixed()
    values = {n: nn.Parameter(v) for n, v in program.values.items()}
    model = Program(program, "model", {"entries": values["entries"]})
    guide = Program(program, "guide", {n: values[n] for n in ("address", "loc", "log_scale")})
    return model, guide, (torch.full((N,), 0.7, dtype=torch.float64),)


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
    names = ["vimco", "loo", "ovis", "rloo", "pyro-graph"]
    estimators = {name: make(name, 3, site="a") for name in names}
    table = compare(model, guide, args, estimators=estimators, draws=400, show_progress=False)
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
    model, guide, args = mixed()
    pyro.enable_validation(False)
    elbo = MultiSampleELBO(2, baseline=loo, max_plate_nesting=1)
    table = compare(
        model, guide, args, estimators={"loo": elbo}, draws=400, reference_draws=1000, show_progress=False
    )
    row = table.of("loo", "discrete guide")
    torch.manual_seed(7)
    parameter = guide.p["address"]
    gradients = torch.stack(
        [torch.autograd.grad(elbo.differentiable_loss(model, guide, *args), parameter)[0] for _ in range(1000)]
    )
    variance, square = gradients.var(0).sum(), gradients.mean(0).square().sum()
    assert row.relative_variance == pytest.approx((variance / square).item(), rel=0.25)
    assert row.snr == pytest.approx((square / variance).sqrt().item(), rel=0.2)
    assert row.bias_z < 4.5
    assert row.reference == "discrete sites enumerated"
    assert 1 <= row.effective_samples <= 2
    assert row.variance_time == pytest.approx(row.relative_variance * row.milliseconds)


def test_every_estimator_fits_in_one_table():
    model, guide, args = mixed()
    estimators = {name: make(name, 3, site="a") for name in ESTIMATORS}
    table = compare(model, guide, args, estimators=estimators, draws=3, warm_up=2, show_progress=False)
    assert {row.estimator for row in table.rows} == set(ESTIMATORS)
    assert {row.group for row in table.rows} == {"discrete guide", "continuous guide", "model"}
    content = json.loads(table.to_json())
    assert len(content["rows"]) == 3 * len(ESTIMATORS)
    assert table.to_markdown().count("| vimco |") == 3
    evaluations = {row.estimator: row.evaluations for row in table.rows}
    assert evaluations["vimco"] == 3
    assert evaluations["vimco+2z"] == 6
    assert evaluations["ovis-mc"] == 4
    assert evaluations["exact"] == 3
    assert evaluations["pyro-enum"] == 3


def test_what_claims_to_be_unbiased_is_held_to_its_own_objective():
    model, guide, args = mixed()
    pyro.enable_validation(False)
    names = ["distinct", "vimco+common", "vimco+2z", "unordered-set", "wake-wake"]
    estimators = {name: make(name, 2, site="a") for name in names}
    table = compare(model, guide, args, estimators=estimators, draws=60, show_progress=False)
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
    """loo and dreg gain like sqrt(K); vimco and iwae lose like 1 / sqrt(K). K = 4 ... 256."""
    pyro.enable_validation(False)
    Ks, found = [4, 16, 64, 256], {"vimco": [], "loo": [], "iwae": [], "dreg": []}
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
