"""Bad input is told in one line that names the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro.infer import (
    NVIL,
    OVIS,
    RLOO,
    CriticELBO,
    DistinctELBO,
    ExactELBO,
    MultiSampleELBO,
    OVISMonteCarlo,
    RelaxedELBO,
    ThermodynamicELBO,
    UnorderedSetELBO,
    WakeWake,
    dreg,
    iwae,
    loo,
    make,
    reinforce,
    stl,
    vimco,
)

N, S = 4, 3


def model(x, second="normal"):
    with pyro.plate("data", N):
        a = pyro.sample("a", dist.Categorical(logits=torch.zeros(S)))
        if second == "count":
            b = pyro.sample("b", dist.Poisson(1.0))
        elif second == "gamma":
            b = pyro.sample("b", dist.Uniform(0.0, 1.0))
        else:
            b = pyro.sample("b", dist.Normal(1.0 * a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def guide_with(second="normal", infer_a=None, infer_b=None, chained=False):
    logits, loc = torch.zeros(N, S, requires_grad=True), torch.zeros(N, requires_grad=True)

    def guide(x, second=second):
        with pyro.plate("data", N):
            pyro.sample("a", dist.Categorical(logits=logits), infer=infer_a or {})
            if second == "count":
                pyro.sample("b", dist.Poisson(loc.exp()), infer=infer_b or {})
            elif second == "gamma":
                pyro.sample("b", dist.Uniform(0.0, 0.5 + loc.sigmoid()), infer=infer_b or {})
            else:
                b = pyro.sample("b", dist.Normal(loc, 1.0), infer=infer_b or {})
                if chained:
                    pyro.sample("c", dist.Normal(b, 1.0), infer={"is_auxiliary": True})

    return guide


def masked_guide(x):
    with pyro.plate("data", N):
        masked = dist.Categorical(logits=torch.zeros(N, S)).mask(torch.tensor([True, False, True, True]))
        pyro.sample("a", masked)
        pyro.sample("b", dist.Normal(torch.zeros(N), 1.0))


def subsampled(x):
    with pyro.plate("data", N, subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(pyro.sample("b", dist.Normal(0.0, 1.0)), 1.0), obs=x[rows])


def subsampled_guide(x):
    with pyro.plate("data", N, subsample_size=2):
        pyro.sample("b", dist.Normal(0.0, 1.0))


X = torch.zeros(N)


def multi(K=3, **options):
    return MultiSampleELBO(K, max_plate_nesting=1, **options)


CASES = {
    "a pathwise rule for a discrete site": (
        lambda: multi().loss(model, guide_with(infer_a={"estimator": dreg}), X),
        "site 'a': expected a score baseline, as it is not reparameterised, got the pathwise rule 'dreg'",
    ),
    "a score baseline for a reparameterised site": (
        lambda: multi().loss(model, guide_with(infer_b={"estimator": loo}), X),
        "site 'b': expected a pathwise rule .* got the score baseline 'loo'",
    ),
    "too few particles for a site's own baseline": (
        lambda: multi(1, baseline=reinforce).loss(model, guide_with(infer_a={"estimator": vimco}), X),
        "site 'a': expected at least 2 particles for its baseline 'vimco', got 1",
    ),
    "dreg where another site depends on the value": (
        lambda: multi(pathwise=dreg).differentiable_loss(model, guide_with(chained=True), X),
        "site 'b': expected no latent site of the guide to depend on it under the rule 'dreg', but 'c' does",
    ),
    "dreg with common noise": (
        lambda: multi(pathwise=dreg, noise="common"),
        "pathwise: expected iwae with common noise",
    ),
    "common noise for another family": (
        lambda: multi(noise="common").loss(lambda x: model(x, "gamma"), guide_with("gamma"), X),
        "site 'b': expected a location-scale family for common noise .*, got Uniform",
    ),
    "an enumerated site": (
        lambda: multi().loss(model, guide_with(infer_a={"enumerate": "parallel"}), X),
        "site 'a': expected a site to sample, but it is marked for enumeration",
    ),
    "an infinite support": (
        lambda: ExactELBO(site="b", max_plate_nesting=1).loss(lambda x: model(x, "count"), guide_with("count"), X),
        "site 'b': expected a finite support to choose values from, got Poisson",
    ),
    "a defensive proposal on an infinite support": (
        lambda: WakeWake(3, defensive=0.1, max_plate_nesting=1).loss(
            lambda x: model(x, "count"), guide_with("count"), X
        ),
        "site 'b': expected a finite support for a defensive proposal, got Poisson",
    ),
    "a second discrete site beside the chosen one": (
        lambda: DistinctELBO(2, site="a", max_plate_nesting=1).loss(
            lambda x: model(x, "count"), guide_with("count"), X
        ),
        "site 'b': expected a reparameterised site beside",
    ),
    "no such site": (
        lambda: ExactELBO(site="c", max_plate_nesting=1).loss(model, guide_with(), X),
        "site 'c': expected among the latent sites of the guide, found",
    ),
    "more values than there are": (
        lambda: UnorderedSetELBO(4, site="a", max_plate_nesting=1).loss(model, guide_with(), X),
        "num_particles: expected at most the 3 values of site 'a', got 4",
    ),
    "too many values for a set": (
        lambda: UnorderedSetELBO(13, site="a"),
        "num_particles: expected at most 12 values in a set, got 13",
    ),
    "nothing to relax": (
        lambda: RelaxedELBO(2, site="c", max_plate_nesting=1).loss(model, guide_with(), X),
        "site 'c': expected a categorical site in the guide, found none",
    ),
    "a relaxed site that is not categorical": (
        lambda: RelaxedELBO(2, site="b", max_plate_nesting=1).loss(model, guide_with(), X),
        "site 'b': expected a Categorical, OneHotCategorical or Bernoulli to relax, got Normal",
    ),
    "dreams without an argument": (
        lambda: WakeWake(2, insomnia=0.0, dreams={"x": "y"}, max_plate_nesting=1).loss(model, guide_with(), X),
        "dreams: expected the argument that holds the data of site 'x'",
    ),
    "a critic of another size": (
        lambda: CriticELBO(2, critic=Constant(5), site="a", max_plate_nesting=1).loss(model, guide_with(), X),
        "critic: expected output .*3.*, one value for each of site 'a', got",
    ),
    "a critic of no site": (
        lambda: CriticELBO(2, critic=Constant(3), site="c", max_plate_nesting=1).loss(model, guide_with(), X),
        "site 'c': expected among the guide's sites that are not reparameterised, found none",
    ),
    "a site's own rule under another objective": (
        lambda: ExactELBO(site="a", max_plate_nesting=1).differentiable_loss(
            model, guide_with(infer_b={"estimator": dreg}), X
        ),
        "site 'b': expected no pathwise rule of its own under ExactELBO, got 'dreg'",
    ),
    "fresh particles for one site": (
        lambda: multi().loss(model, guide_with(infer_a={"estimator": OVISMonteCarlo(2)}), X),
        "site 'a': expected 'OVISMonteCarlo' as the objective's own baseline",
    ),
    "a chosen site with a mask of its own": (
        lambda: UnorderedSetELBO(2, site="a", max_plate_nesting=1).loss(model, masked_guide, X),
        "site 'a': expected its mask from poutine.mask",
    ),
    "sleep on a random subsample": (
        lambda: WakeWake(2, insomnia=0.0, max_plate_nesting=1).loss(subsampled, subsampled_guide, X),
        "insomnia: expected 1 .no sleep. with randomly subsampled plates",
    ),
    "one particle": (lambda: RLOO(1), "num_particles: expected at least 2 for RLOO, got 1"),
    "no particle": (lambda: multi(0), "num_particles: expected at least 1, got 0"),
    "noise": (lambda: RLOO(2, noise="loud"), "noise: expected 'independent' or 'common', got 'loud'"),
    "gamma": (lambda: OVIS(2.0), "gamma: expected 0 <= gamma <= 1, got 2.0"),
    "samples": (lambda: OVISMonteCarlo(0), "samples: expected at least 1, got 0"),
    "decay": (lambda: NVIL(decay=1.0), "decay: expected 0 <= decay < 1, got 1.0"),
    "betas": (lambda: ThermodynamicELBO(3, betas=(0.0, 0.5, 0.2)), "betas: expected numbers that rise from 0"),
    "insomnia": (lambda: WakeWake(2, insomnia=2.0), "insomnia: expected 0 <= insomnia <= 1, got 2.0"),
    "defensive": (lambda: WakeWake(2, defensive=1.0), "defensive: expected 0 <= defensive < 1, got 1.0"),
    "temperature": (lambda: RelaxedELBO(2, temperature=0.0), "temperature: expected more than 0, got 0.0"),
    "chunks": (lambda: multi(chunk_size=0), "chunk_size: expected at least 1, got 0"),
    "chunks of shared draws": (lambda: multi(chunk_size=1, draws_per_score=2), "chunk_size: expected None"),
    "draws per score": (lambda: multi(draws_per_score=0), "draws_per_score: expected at least 1, got 0"),
    "who the guide follows": (
        lambda: DistinctELBO(2, guide_follows="me"),
        "guide_follows: expected 'bound' or 'posterior', got 'me'",
    ),
    "an unknown name": (lambda: make("best", 2), "name: expected one of"),
}


class Constant(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.values.expand(len(x), -1)


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_the_culprit(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vimco", "rloo", "wake-wake", "tvo", "distinct", "exact", "unordered-set"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word on it, before ours
def test_nan_in_a_weight_names_the_site(name):
    def broken(x):
        with pyro.plate("data", N):
            pyro.sample("a", dist.Categorical(logits=torch.zeros(S)))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(b * float("nan"), 1.0, validate_args=False), obs=x)

    with pytest.raises(ValueError, match="site 'x': expected a log probability, got NaN") as error:
        make(name, 2, site="a").loss(broken, guide_with(), X)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vimco", "rloo", "wake-wake", "tvo", "distinct", "exact"])
def test_a_site_outside_the_batch_plates_is_named(name):
    def outside(x):
        pyro.sample("noise", dist.Normal(0.0, 1.0))
        model(x)

    def its_guide(x):
        pyro.sample("noise", dist.Normal(torch.zeros((), requires_grad=True), 1.0))
        guide_with()(x)

    with pytest.raises(ValueError, match="site 'noise': expected inside the batch plates") as error:
        make(name, 2, site="a").loss(outside, its_guide, X)
    assert "\n" not in str(error.value)


def test_sites_choose_their_own_estimator():
    """A rule or baseline at a site has the effect of the same one everywhere, for that site."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(3))

    def gradients(elbo, infer_a, infer_b):
        logits, loc = torch.zeros(N, S, requires_grad=True), torch.zeros(N, requires_grad=True)

        def guide(x):
            with pyro.plate("data", N):
                pyro.sample("a", dist.Categorical(logits=logits), infer=infer_a)
                pyro.sample("b", dist.Normal(loc, 1.0), infer=infer_b)

        torch.manual_seed(0)
        return torch.autograd.grad(elbo.differentiable_loss(model, guide, x), [logits, loc])

    plain = gradients(multi(), {}, {})
    everywhere = gradients(multi(baseline=loo, pathwise=stl), {}, {})
    at_sites = gradients(multi(), {"estimator": loo}, {"estimator": stl})
    torch.testing.assert_close(at_sites, everywhere)
    assert not torch.allclose(at_sites[0], plain[0])
    assert not torch.allclose(at_sites[1], plain[1])
    one = gradients(multi(baseline=loo, pathwise=stl), {}, {"estimator": iwae})
    torch.testing.assert_close(one[0], everywhere[0])
    torch.testing.assert_close(one[1], plain[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CriticELBO(2, critic=Constant(3), site="a", draws_per_score=2),
            "draws_per_score: expected 1, as the critic judges all particles at once, got 2",
        ),
        (
            lambda: CriticELBO(2, critic=Constant(3), site="a", vectorize_particles=False),
            "vectorize_particles: expected True, as the critic judges all particles at once, got False",
        ),
        (lambda: WakeWake(2, noise="common"), "noise: expected 'independent' for WakeWake, got 'common'"),
        (
            lambda: ExactELBO(site="a", vectorize_particles=False),
            "vectorize_particles: expected True for ExactELBO, got False",
        ),
    ],
)
def test_an_argument_that_an_estimator_cannot_serve(build, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()
