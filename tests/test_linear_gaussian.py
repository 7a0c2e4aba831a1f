"""log_likelihood against a linear-Gaussian memory model, whose log p(x|M) is a mixture of Gaussians.

Entries m are vectors: p(z | m) = N(W m, I), p(x | z, m) = N(V z + m, s^2 I), p(a) = 1/|M|, so that
p(x | M) = 1/|M| sum_a N(x; V W m_a + m_a, V V^T + s^2 I).
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from vma_pyro import Memory
from vma_pyro.evaluation import Mean, classify_by_likelihood, kl_report, log_likelihood

B, S, D, Z, NOISE = 4, 6, 3, 2, 0.6
torch.manual_seed(0)
W, V = torch.randn(Z, D, dtype=torch.float64), torch.randn(D, Z, dtype=torch.float64)


def model(memory, x=None):
    with pyro.plate("data", 1 if x is None else len(x)):
        a = pyro.sample("address", dist.Categorical(logits=torch.zeros(memory.size, dtype=torch.float64)))
        m = memory.read(a)
        z = pyro.sample("z", dist.Normal(m @ W.T, 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z @ V.T + m, NOISE).to_event(1), obs=x)


def posterior_of_z(m, x):
    """Mean and Cholesky factor of p(z | x, m)."""
    precision = torch.eye(Z, dtype=torch.float64) + V.T @ V / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = (m @ W.T + (x - m) @ V / NOISE**2) @ covariance
    return mean, torch.linalg.cholesky(covariance)


def log_joint(memory, x):
    """log p(a) p(x | m_a), [B, S], with z integrated out."""
    entries = memory.entries if not memory.is_shared else memory.entries.expand(len(x), -1, -1)
    covariance = V @ V.T + NOISE**2 * torch.eye(D, dtype=torch.float64)
    marginal = dist.MultivariateNormal(entries @ W.T @ V.T + entries, covariance)
    return marginal.log_prob(x[:, None]) - math.log(memory.size)


def exact_guide(memory, x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("address", dist.Categorical(logits=log_joint(memory, x)))
        mean, factor = posterior_of_z(memory.read(a), x)
        pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=factor))


def rough_guide(memory, x):
    """Off in both sites, with tails wide enough for importance sampling."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("address", dist.Categorical(logits=0.5 * log_joint(memory, x)))
        mean, factor = posterior_of_z(memory.read(a), x)
        pyro.sample("z", dist.MultivariateNormal(mean + 0.1, scale_tril=1.3 * factor))


@pytest.fixture(params=["shared", "per datapoint"])
def problem(request):
    generator = torch.Generator().manual_seed(1)
    lead = (S,) if request.param == "shared" else (B, S)
    memory = Memory(torch.randn(*lead, D, generator=generator, dtype=torch.float64), event_dim=1)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return memory, x, log_joint(memory, x).logsumexp(1)


def test_sampled_bound_is_the_evidence_within_four_standard_errors(problem):
    memory, x, evidence = problem
    runs = torch.stack(
        [log_likelihood(model, rough_guide, memory, x, num_samples=5000, seed=seed) for seed in range(10)]
    )
    error = (runs.mean(0) - evidence) / (runs.std(0) / math.sqrt(10))
    assert error.abs().max() < 4
    assert (runs.std(0) > 0).all()


def test_exact_address_is_tighter(problem):
    memory, x, evidence = problem
    gaps = {
        address: torch.stack(
            [
                evidence - log_likelihood(model, rough_guide, memory, x, num_samples=3, address=address, seed=seed)
                for seed in range(50)
            ]
        ).mean()
        for address in ("sampled", "exact")
    }
    assert 0 < gaps["exact"] < 0.5 * gaps["sampled"]


@pytest.mark.parametrize("address", ["sampled", "exact"])
def test_the_true_posterior_gives_the_evidence(problem, address):
    memory, x, evidence = problem
    bound = log_likelihood(model, exact_guide, memory, x, num_samples=2, address=address)
    torch.testing.assert_close(bound, evidence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("address", ["sampled", "exact"])
def test_chunks_change_nothing_but_the_noise(problem, address, monkeypatch):
    memory, x, evidence = problem
    monkeypatch.setattr("vma_pyro.evaluation.chunks.READS_PER_CHUNK", 4)
    report = kl_report(model, exact_guide, memory, x, num_samples=7)
    assert report.nll.mean == pytest.approx(-evidence.mean().item(), abs=1e-6)
    bound = log_likelihood(model, exact_guide, memory, x, num_samples=5, address=address)
    torch.testing.assert_close(bound, evidence, rtol=0, atol=1e-6)


def test_kl_report_adds_up_under_the_true_posterior(problem):
    """reconstruction + KL(a) + KL(z) = -log p(x) when the guide is the posterior, and the KL(a) is exact."""
    memory, x, evidence = problem
    report = kl_report(
        model,
        exact_guide,
        memory,
        x,
        num_samples=4000,
        memoryless_nll=torch.full((B,), 10.0, dtype=torch.float64),
    )
    parts = report.reconstruction.mean + report.kl_address.mean + report.kl_z.mean
    assert parts == pytest.approx(-evidence.mean().item(), abs=0.1)
    q = log_joint(memory, x).softmax(1)
    kl = (q * (q.log() + math.log(S))).sum(1)
    assert report.kl_address == pytest.approx(Mean.of(kl))
    assert report.kl_address_bits.mean == pytest.approx(kl.mean().item() / math.log(2))
    assert report.kl_address_share.mean == pytest.approx(kl.mean().item() / math.log(S))
    assert report.perplexity.mean == pytest.approx(torch.special.entr(q).sum(1).exp().mean().item())
    assert report.effective_samples.mean == pytest.approx(4000, rel=1e-6)
    assert report.information_gained.mean == pytest.approx(10 + evidence.mean().item(), abs=1e-6)
    assert report.nll.mean == pytest.approx(-evidence.mean().item(), abs=1e-6)
    if memory.is_shared:
        marginal = q.mean(0)
        information = torch.special.entr(marginal).sum() - torch.special.entr(q).sum(1).mean()
        assert report.mutual_information.mean == pytest.approx(information.item())
    else:
        assert report.mutual_information is None


@pytest.mark.parametrize("address", ["sampled", "exact"])
def test_a_program_may_take_the_memory_as_a_plain_tensor(problem, address):
    memory, x, evidence = problem

    def as_memory(program):
        return lambda entries, x=None: program(Memory(entries, event_dim=1), x)

    programs = as_memory(model), as_memory(exact_guide)
    bound = log_likelihood(*programs, memory.entries, x, num_samples=2, address=address)
    torch.testing.assert_close(bound, evidence, rtol=0, atol=1e-6)
    assert kl_report(*programs, memory.entries, x, num_samples=2).nll.mean == pytest.approx(
        -evidence.mean().item()
    )


LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


def class_posterior(memory, x):
    q = log_joint(memory, x).softmax(1)
    return torch.stack([q[:, c == LABELS].sum(1) for c in range(3)], 1)


@pytest.mark.parametrize("reads", [2048, 10, 3])  # whole draws, some draws, parts of the addresses of one draw
def test_classes_by_likelihood_are_those_of_the_true_posterior(problem, reads, monkeypatch):
    monkeypatch.setattr("vma_pyro.evaluation.chunks.READS_PER_CHUNK", reads)
    memory, x, _ = problem
    labels = LABELS if memory.is_shared else LABELS.expand(B, -1)
    labelled = Memory(memory.entries, labels, event_dim=1)
    found = classify_by_likelihood(model, exact_guide, labelled, x, num_samples=3)
    torch.testing.assert_close(found, class_posterior(memory, x), rtol=1e-10, atol=1e-12)


def test_classes_by_likelihood_need_no_good_address_posterior(problem):
    memory, x, _ = problem
    labels = LABELS if memory.is_shared else LABELS.expand(B, -1)
    labelled = Memory(memory.entries, labels, event_dim=1)
    found = classify_by_likelihood(model, rough_guide, labelled, x, num_samples=4000)
    torch.testing.assert_close(found, class_posterior(memory, x), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0"):
        classify_by_likelihood(model, rough_guide, labelled, x, num_samples=0)
