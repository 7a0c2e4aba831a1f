"""Evaluation on image models: classification, reports, and that nothing is disturbed."""

import math

import pyro
import pytest
import torch

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.baselines import MemorylessGuide, MemorylessModel
from vma_pyro.evaluation import (
    Estimate,
    TwoPhase,
    address_posterior,
    classify,
    kl_report,
    log_likelihood,
)

B, S, C = 4, 6, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def setting(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    return Model(networks), Guide(networks), Memory(random_images(S), LABELS), random_images(B)


def test_estimate():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 6.0]))
    assert estimate == pytest.approx((3.0, math.sqrt(7.0 / 3), 3))
    assert str(Estimate(3.0, 0.25, 9)) == "3.00 ± 0.25"


def test_pooled_estimates_are_those_of_all_values_together():
    values = torch.randn(11)
    parts = [Estimate.of(part) for part in values.split([4, 1, 6])]
    assert Estimate.pooled(parts) == pytest.approx(Estimate.of(values), rel=1e-5)
    assert math.isnan(Estimate.pooled(parts[1:2]).se)


def test_two_phases_estimate_the_costly_mean_with_the_error_they_state():
    everywhere, n, trials = 400, 40, 400
    torch.manual_seed(0)
    truth = 5.0
    means, errors, plain = [], [], []
    for _ in range(trials):
        costly = truth + 10 * torch.randn(everywhere)
        cheap = costly + 3 + torch.randn(everywhere)
        found = TwoPhase(cheap, costly[:n]).estimate()
        means.append(found.mean)
        errors.append(found.se)
        plain.append(Estimate.of(costly[:n]).se)
        assert found.n == everywhere
    spread = torch.tensor(means).std().item()
    assert sum(means) / trials == pytest.approx(truth, abs=4 * spread / math.sqrt(trials))
    assert sum(errors) / trials == pytest.approx(spread, rel=0.15)
    assert spread < 0.4 * sum(plain) / trials
    whole = TwoPhase(cheap, costly).estimate()  # all of them: nothing to correct
    assert whole == pytest.approx(Estimate.of(costly), rel=1e-5)
    assert TwoPhase(cheap, costly).minus(TwoPhase(cheap, costly)).estimate()[:2] == (0, 0)
    assert math.isnan(TwoPhase(cheap, costly[:1]).estimate().se)


def test_classify_sums_the_posterior_over_entries_of_a_class(setting, random_images):
    _, guide, memory, x = setting
    q = address_posterior(guide, memory, x)
    assert q.shape == (B, S)
    expected = torch.stack([q[:, c == LABELS].sum(1) for c in range(C)], dim=1)
    torch.testing.assert_close(classify(guide, memory, x), expected)
    own = Memory(memory.entries.expand(B, -1, -1, -1, -1), LABELS.expand(B, -1))
    torch.testing.assert_close(classify(guide, own, x), expected)
    assert classify(guide, memory, x, num_classes=5).shape == (B, 5)


def test_nothing_is_disturbed(setting):
    model, guide, memory, x = setting
    guide.train()
    state = torch.get_rng_state()
    log_likelihood(model, guide, memory, x, num_samples=3)
    log_likelihood(model, guide, memory, x, num_samples=3, address="exact")
    kl_report(model, guide, memory, x, labels=torch.zeros(B), num_samples=3)
    classify(guide, memory, x)
    assert (torch.get_rng_state() == state).all()
    assert model.training
    assert guide.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_bounds_tighten_with_samples_and_repeat_with_the_seed(setting):
    model, guide, memory, x = setting
    bounds = [log_likelihood(model, guide, memory, x, num_samples=n).mean() for n in (1, 30, 3000)]
    assert bounds[0] < bounds[1] < bounds[2]
    again = log_likelihood(model, guide, memory, x, num_samples=30)
    assert (again == log_likelihood(model, guide, memory, x, num_samples=30)).all()
    assert (again != log_likelihood(model, guide, memory, x, num_samples=30, seed=1)).any()


def test_sanity_identities(setting):
    model, guide, memory, x = setting
    report = kl_report(model, guide, memory, x, labels=torch.zeros(B), num_samples=50)
    assert 0 <= report.kl_address.mean <= report.log_memory == pytest.approx(math.log(S))
    assert 1 <= report.perplexity.mean <= S
    assert 1 <= report.effective_samples.mean <= 50
    assert 0 <= report.right_class.mean <= 1
    single = kl_report(model, guide, Memory(memory.entries[:1]), x, num_samples=5)
    assert single.kl_address.mean == pytest.approx(0, abs=1e-6)
    elbo = -(report.reconstruction.mean + report.kl_address.mean + report.kl_z.mean)
    assert elbo < -report.nll.mean


def test_the_memoryless_model_is_evaluated_alike(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model, guide = MemorylessModel(networks), MemorylessGuide(networks)
    memory, x = Memory(random_images(S)), random_images(B)
    assert log_likelihood(model, guide, memory, x, num_samples=3).shape == (B,)
    report = kl_report(model, guide, memory, x, num_samples=3)
    assert report.kl_address.mean == 0
    with pytest.raises(ValueError, match="^address: expected a site 'address' in the guide"):
        log_likelihood(model, guide, memory, x, num_samples=3, address="exact")
    with pytest.raises(ValueError, match="^guide: expected a site 'address'"):
        classify(guide, Memory(memory.entries, LABELS), x)


class TestErrors:
    def test_samples_and_modes(self, setting):
        with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0$"):
            log_likelihood(*setting, num_samples=0)
        with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0$"):
            kl_report(*setting, num_samples=0)
        with pytest.raises(ValueError, match="^address: expected 'sampled' or 'exact', got 'guess'$"):
            log_likelihood(*setting, address="guess")

    def test_images(self, setting):
        model, guide, memory, x = setting
        with pytest.raises(ValueError, match=r"^x: expected at least one image, got shape \[0, 1, 28, 28\]$"):
            log_likelihood(model, guide, memory, x[:0])
        with pytest.raises(ValueError, match="^x: expected finite values, got 3136 NaN"):
            log_likelihood(model, guide, memory, x * math.nan)
        with pytest.raises(ValueError, match="^x: expected shape"):
            classify(guide, memory, x[..., :14])

    def test_labels(self, setting):
        model, guide, memory, x = setting
        with pytest.raises(ValueError, match=r"^labels: expected shape \[4\], one per image, got \[3\]$"):
            kl_report(model, guide, memory, x, labels=torch.zeros(3))
        with pytest.raises(ValueError, match=r"^memoryless_nll: expected shape \[4\]"):
            kl_report(model, guide, memory, x, memoryless_nll=torch.zeros(3))
        with pytest.raises(ValueError, match=r"^memoryless_nll: expected shape \[4\]"):
            kl_report(model, guide, memory, x).gained_over(torch.zeros(3))
        unlabelled = Memory(memory.entries)
        with pytest.raises(ValueError, match="^memory.labels: expected labels of the entries, got None$"):
            classify(guide, unlabelled, x)
        with pytest.raises(ValueError, match="^memory.labels: expected labels of the entries, got None$"):
            kl_report(model, guide, unlabelled, x, labels=torch.zeros(B))
        with pytest.raises(ValueError, match=r"^memory.labels: expected values 0..1, got 0..2$"):
            classify(guide, memory, x, num_classes=2)


def test_a_program_of_ones_own_is_evaluated(setting):
    """Nothing but the sites and the signature is assumed."""
    model, guide, memory, x = setting

    def edited(memory, x=None):
        with pyro.poutine.scale(scale=1.0):
            return model(memory, x)

    torch.testing.assert_close(
        log_likelihood(edited, guide, memory, x, num_samples=5),
        log_likelihood(model, guide, memory, x, num_samples=5),
    )
