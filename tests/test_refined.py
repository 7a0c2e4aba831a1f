"""Guides refined per image, against closed forms: what is won is the guide's distance, and bounds stay bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.evaluation import guide_gap, log_likelihood

B, S, Z, NOISE = 5, 3, 2, 0.7
DOUBLE = {"dtype": torch.float64}


def model(memory, x):
    """Latents that are independent in the posterior, a diagonal Gaussian: N(V (z0 + (x - m) / s^2), V)."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("address", dist.Categorical(logits=torch.zeros(S, **DOUBLE)))
        z = pyro.sample("z", dist.Normal(torch.zeros(Z, **DOUBLE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + memory.read(a), NOISE).to_event(1), obs=x)


VARIANCE = 1 / (1 + NOISE**-2)
OFF, FACTOR = 0.6, 1.7  # of the guide


def log_evidence(memory, x):
    """log p(x | m_a) [B, S]."""
    return dist.Normal(memory.entries, math.sqrt(1 + NOISE**2)).to_event(1).log_prob(x[:, None])


def guide(memory, x):
    """The posterior of the address; z is off, and too wide, by the same for all entries."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("address", dist.Categorical(logits=log_evidence(memory, x)))
        loc = VARIANCE * (x - memory.read(a)) / NOISE**2 + OFF
        pyro.sample("z", dist.Normal(loc, FACTOR * math.sqrt(VARIANCE)).to_event(1))


@pytest.fixture
def problem():
    memory = Memory(torch.randn(S, Z, **DOUBLE), event_dim=1)
    return memory, torch.randn(B, Z, **DOUBLE)


def test_the_gap_is_the_divergence_of_the_guide(problem):
    """KL(q(z) || p(z | x, m)) is the same for all entries and images; 20,000 draws, |z| < 5."""
    memory, x = problem
    found = guide_gap(model, guide, memory, x, steps=200, num_samples=20_000, particles=8)
    sd = math.sqrt(VARIANCE)
    q, p = (
        torch.distributions.Normal(torch.tensor(loc, **DOUBLE), s) for loc, s in ((OFF, FACTOR * sd), (0.0, sd))
    )
    expected = Z * torch.distributions.kl_divergence(q, p).item()
    evidence = (log_evidence(memory, x).logsumexp(1) - math.log(S)).mean().item()
    assert found.gap.mean == pytest.approx(expected, abs=0.05)
    assert found.refined_elbo.mean == pytest.approx(evidence, abs=0.02)
    assert found.elbo.mean == pytest.approx(evidence - expected, abs=0.06)
    assert found.bound.mean == pytest.approx(evidence, abs=0.02)
    assert found.refined_bound.mean == pytest.approx(evidence, abs=0.01)
    assert str(found).startswith("ELBO: ")


@pytest.mark.parametrize("address", ["sampled", "exact"])
def test_the_refined_bound_is_tighter_and_no_more_than_the_evidence(problem, address):
    """One sample: the mean of the bound over 100 seeds is the ELBO, before and after; |z| < 5."""
    memory, x = problem
    evidence = log_evidence(memory, x).logsumexp(1) - math.log(S)
    plain, better = (
        torch.stack(
            [
                log_likelihood(model, guide, memory, x, num_samples=1, address=address, refine=refine, seed=seed)
                for seed in range(number)
            ]
        )
        for refine, number in ((0, 100), (60, 10))
    )
    for values in (plain, better):
        se = values.std(0) / math.sqrt(len(values))
        assert bool((values.mean(0) < evidence + 5 * se).all())
    assert better.mean() > plain.mean() + 0.3


KINDS = {
    "positive": (dist.LogNormal(0.3, 0.5), dist.LogNormal(0.0, 1.0)),
    "gamma": (dist.Gamma(2.0, 1.5), dist.Gamma(5.0, 1.0)),
    "share": (dist.Beta(2.0, 3.0), dist.Beta(1.0, 1.0)),
    "shares": (dist.Dirichlet(torch.tensor([2.0, 3.0, 1.5])), dist.Dirichlet(torch.ones(3))),
    "interval": (dist.Uniform(-1.0, 3.0), dist.Uniform(-1.0, 3.0)),
    "correlated": (
        dist.MultivariateNormal(torch.ones(2), torch.eye(2)),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_every_support(kind):
    """Without data log p is 0: the refined guide gets nearer to the prior, and stays below; |z| < 5."""
    prior, rough = KINDS[kind]

    def empty(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def off(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", rough)

    x = torch.zeros(6)
    found = guide_gap(empty, off, torch.zeros(1), x, steps=60, num_samples=2000)
    evidence = dist.Normal(0.0, 1.0).log_prob(torch.zeros(())).item()
    assert found.refined_elbo.mean <= evidence + 0.02
    if kind == "interval":  # is the prior already
        assert abs(found.gap.mean) < 0.02
    else:
        assert found.gap.mean > 0.02
        assert found.refined_elbo.mean > found.elbo.mean


def test_sites_with_a_plate_of_their_own_and_others_that_stay_as_they_are():
    """Two latents in a plate of 4, a bit after them: its probabilities follow the corrected draws."""

    def two(memory, x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 4, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
            total = z.sum(-2, keepdim=True)
            b = pyro.sample("b", dist.Bernoulli(logits=total))
            pyro.sample("x", dist.Normal(total + b, 0.5), obs=x)

    def rough(memory, x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 4, dim=-2):
                z = pyro.sample("z", dist.Normal(x / 8, 1.0))
            pyro.sample("b", dist.Bernoulli(logits=z.sum(-2, keepdim=True)))

    x = torch.randn(B, **DOUBLE)
    found = guide_gap(two, rough, torch.zeros(1), x, steps=80, num_samples=4000)
    exact = log_likelihood(two, rough, torch.zeros(1), x, num_samples=100_000).mean().item()
    assert found.gap.mean > 0.2
    assert found.refined_elbo.mean < exact + 0.02
    assert found.refined_bound.mean < exact + 0.02


def test_a_masked_latent_is_left_alone_and_programs_without_any_are_refused():
    def masked(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).mask(torch.arange(len(x)) < 2))
            pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def its_guide(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.0, 1.0).mask(torch.arange(len(x)) < 2))
            pyro.sample("y", dist.Normal(1.0, 1.0))

    x = torch.zeros(4)
    found = guide_gap(masked, its_guide, torch.zeros(1), x, steps=120, num_samples=4000)
    assert found.gap.mean == pytest.approx(0.5, abs=0.06)  # KL of y alone; that of z is 0.5 for two of four

    def discrete(memory, x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.full((len(x),), 0.3)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def bits(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.full((len(x),), 0.5)))

    with pytest.raises(
        ValueError, match="^refine: expected a reparameterised latent without a mask in the guide, found 'b'$"
    ):
        log_likelihood(discrete, bits, torch.zeros(1), x, num_samples=2, refine=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"particles": 0}, "particles: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0, got 0.0"),
    ],
)
def test_numbers_that_mean_nothing(problem, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        guide_gap(model, guide, *problem, **options)
    with pytest.raises(ValueError, match="^refine: expected at least 0, got -1$"):
        log_likelihood(model, guide, *problem, refine=-1)


@pytest.mark.parametrize("program", ["memory", "memoryless"])
def test_image_models_are_refined_and_left_as_they_were(random_images, program):
    networks = ConvNetworks(4, width=0.1, key_dim=4, hidden_dim=8, refinement=3)
    kinds = {"memory": (Model, Guide), "memoryless": (MemorylessModel, MemorylessGuide)}[program]
    pair = [kind(networks).train() for kind in kinds]
    nn.init.normal_(networks.hidden_to_posterior.bias)  # far off
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    memory, x = Memory(random_images(S), torch.arange(S)), random_images(B)
    torch.manual_seed(3)
    plain, better = (log_likelihood(*pair, memory, x, num_samples=20, refine=refine) for refine in (0, 40))
    assert better.mean() > plain.mean() + 0.1
    assert torch.equal(better, log_likelihood(*pair, memory, x, num_samples=20, refine=40))  # of its own stream
    expected = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(expected, torch.rand(()))
    assert all(torch.equal(value, before[name]) for name, value in networks.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in networks.parameters())
    assert all(kind.training for kind in pair)
    each = Memory(memory.entries.expand(B, -1, -1, -1, -1), memory.labels.expand(B, -1))
    assert log_likelihood(*pair, each, x, num_samples=20, refine=40).mean() > plain.mean() + 0.1
