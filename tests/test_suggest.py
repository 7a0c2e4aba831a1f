"""Advice for the programs at hand: what runs, ranked by signal-to-noise ratio in one second."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from vma_pyro.infer import suggest
from vma_pyro.infer.comparison.suggest import snr_per_second

X = torch.linspace(-2.0, 2.0, 8)
NAMES = ("vimco", "rloo", "measure-valued", "disarm", "reinmax", "straight-through", "wake-wake")


def points(x):
    means = pyro.param("means", torch.tensor([-1.0, 0.3, 1.2]))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3)))
        pyro.sample("x", dist.Normal(means[a], 0.7), obs=x)


def assignment(x):
    logits = pyro.param("logits", torch.zeros(8, 3))
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Categorical(logits=logits))


@pytest.fixture(autouse=True)
def parameters():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def test_what_runs_and_what_is_best():
    found = suggest(points, assignment, X, estimators=NAMES, draws=20)
    assert [(site.name, site.size) for site in found.sites.discrete] == [("a", 3)]
    assert found.group == "discrete guide"
    best = found.ranked()
    assert [best[0].estimator, {row.estimator for row in best}] == [
        "measure-valued",
        {*NAMES[:3]},
    ]  # without noise
    assert snr_per_second(best[0]) == math.inf
    assert snr_per_second(best[1]) == best[1].snr * math.sqrt(1000 / best[1].milliseconds)
    assert snr_per_second(best[1]) >= snr_per_second(best[2])
    assert [row.estimator for row in found.ranked(unbiased=False)] == ["wake-wake"]
    assert set(found.left_out) == {"disarm", "reinmax", "straight-through"}

    page = str(found).splitlines()
    assert page[1] == "- 'a': 3 values for each datapoint"
    assert next(line for line in page if line.startswith("| measure-valued")).count("no noise") == 2
    assert "3 estimators do not run on these programs:" in page
    assert page[-1].startswith("- reinmax, straight-through: site 'a': expected a program that reads weights")
    assert any(line.startswith("- disarm: site 'a': expected Bernoulli values") for line in page)


def test_programs_and_random_stream_are_left_as_they_were():
    suggest(points, assignment, X, estimators=("vimco",), draws=2)
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    suggest(points, assignment, X, estimators=("vimco", "jsa"), draws=2)
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_vector_of_bits_has_the_estimators_that_take_it():
    """It has too many values to list, but the relaxations and their control variates know its site."""

    def model(x):
        with pyro.plate("data", 8):
            b = pyro.sample("b", dist.Bernoulli(torch.full((13,), 0.4)).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1) - 5, 1.0), obs=x)

    def guide(x):
        logits = pyro.param("bits", torch.zeros(8, 13))
        with pyro.plate("data", 8):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    names = ("reinmax", "gumbel-softmax", "rebar", "relax", "rodeo", "disarm", "unordered-set")
    found = suggest(model, guide, X, estimators=names, draws=2)
    assert {row.estimator for row in found.ranked() + found.ranked(unbiased=False)} == {*names[:-1]}
    assert found.left_out["unordered-set"].startswith("site 'b': expected at most 4096 joint values")


def test_programs_that_fail_in_their_own_way_are_left_out():
    """An assertion on the type of a value is no error of ours, and no end of the advice."""

    def particular(x):
        means = pyro.param("means", torch.tensor([-1.0, 0.3, 1.2]))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3)))
            assert a.dtype == torch.long
            pyro.sample("x", dist.Normal(means[a], 0.7), obs=x)

    found = suggest(particular, assignment, X, estimators=("reinmax", "rloo"), draws=2)
    assert [row.estimator for row in found.ranked()] == ["rloo"]
    assert found.left_out["reinmax"].startswith("AssertionError: ")


def gaussian(x):
    loc = pyro.param("loc", torch.zeros(8))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize(
    ("programs", "options", "message"),
    [
        ((gaussian, gaussian), {}, "^guide: expected a discrete site, found none; without one all gradients are"),
        ((points, assignment), {"estimators": ("disarm",)}, "^estimators: expected one that fits the program"),
        ((points, assignment), {"estimators": "rloo"}, "^estimators: expected a sequence of names, got 'rloo'$"),
        ((points, assignment), {"draws": 1}, "^draws: expected at least 2, got 1$"),
        ((points, assignment), {"estimators": ("vimcoo",)}, "^estimators: expected names among .* got 'vimcoo'$"),
    ],
)
def test_what_is_refused(programs, options, message):
    with pytest.raises(ValueError, match=message) as error:
        suggest(*programs, X, **options)
    assert "\n" not in str(error.value)
