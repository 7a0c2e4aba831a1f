"""Evaluation on image models: classification, reports, and that nothing is disturbed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.evaluation import (
    Mean,
    TwoPhase,
    address_posterior,
    classify,
    kl_report,
    log_likelihood,
    mutual_information,
)
from vma_pyro.memory import BankMemory, KeyedBank
from vma_pyro.retrieval import RetrievalGuide

B, S, C = 4, 6, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def setting(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    return Model(networks), Guide(networks), Memory(random_images(S), LABELS), random_images(B)


def test_estimate():
    estimate = Mean.of(torch.tensor([1.0, 2.0, 6.0]))
    assert estimate == pytest.approx((3.0, math.sqrt(7.0 / 3), 3))
    assert str(Mean(3.0, 0.25, 9)) == "3.00 ± 0.25"


def test_pooled_estimates_are_those_of_all_values_together():
    values = torch.randn(11)
    parts = [Mean.of(part) for part in values.split([4, 1, 6])]
    assert Mean.pooled(parts) == pytest.approx(Mean.of(values), rel=1e-5)
    assert math.isnan(Mean.pooled(parts[1:2]).se)


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
        plain.append(Mean.of(costly[:n]).se)
        assert found.n == everywhere
    spread = torch.tensor(means).std().item()
    assert sum(means) / trials == pytest.approx(truth, abs=4 * spread / math.sqrt(trials))
    assert sum(errors) / trials == pytest.approx(spread, rel=0.15)
    assert spread < 0.4 * sum(plain) / trials
    whole = TwoPhase(cheap, costly).estimate()  # all of them: nothing to correct
    assert whole == pytest.approx(Mean.of(costly), rel=1e-5)
    assert TwoPhase(cheap, costly).minus(TwoPhase(cheap, costly)).estimate()[:2] == (0, 0)
    assert math.isnan(TwoPhase(cheap, costly[:1]).estimate().se)


def test_the_posterior_of_addresses_makes_nothing_of_what_it_reads(setting):
    _, guide, memory, x = setting
    expected = address_posterior(guide, memory, x)
    assert torch.allclose(expected.sum(-1), torch.ones(B))
    read = []
    guide.networks.posterior = lambda query, m: read.append(m)
    assert torch.equal(address_posterior(guide, memory, x), expected)
    assert read == []


def test_the_posterior_of_addresses_after_a_draw_ends_there_too(random_images):
    class Noisy(Guide):
        def forward(self, memory, x):
            memory, x, data = self.opened(memory, x)
            with data:
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
                logits = u.unsqueeze(-1) * torch.arange(float(S))
                pyro.sample("address", dist.Categorical(logits=logits))
                pyro.sample("z", dist.Normal(torch.zeros(4), torch.tensor(-1.0)).to_event(1))  # refused if reached

    guide = Noisy(MLPNetworks(4, hidden_dims=(8, 7), key_dim=6))
    probs = address_posterior(guide, Memory(random_images(S)), random_images(B), num_samples=4000)
    u = torch.linspace(-6, 6, 2001)
    weight = (-u.square() / 2).softmax(0)
    expected = weight @ (u[:, None] * torch.arange(float(S))).softmax(-1)
    assert torch.allclose(probs, expected.expand(B, -1), atol=0.03)


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


class Hierarchical(Model):
    """p(c) p(a | c): a class, then one of its entries."""

    def forward(self, memory, x=None):
        memory = Memory.of(memory)
        batch = len(x)
        with pyro.plate("data", batch, dim=-1):
            label = pyro.sample("class", dist.Categorical(logits=torch.zeros(C)))
            other = memory.labels != label.unsqueeze(-1)
            logits = torch.zeros(memory.size).masked_fill(other, -math.inf)
            m = memory.encode(self.networks).read(pyro.sample("address", dist.Categorical(logits=logits)))
            z = pyro.sample("z", self.networks.prior(m))
            pyro.sample("x", dist.Bernoulli(logits=self.networks.decode(z, m)).to_event(3), obs=x)


class HierarchicalGuide(Guide):
    """The flat guide's q(a | x) as q(c | x) q(a | c, x)."""

    def forward(self, memory, x):
        memory = Memory.of(memory).encode(self.networks)
        query = self.networks.query(x)
        with pyro.plate("data", len(x), dim=-1):
            flat = self.similarity(query.key, memory.features.key).log_softmax(-1)
            of_class = torch.stack([flat[..., memory.labels == c].logsumexp(-1) for c in range(C)], -1)
            label = pyro.sample("class", dist.Categorical(logits=of_class))
            logits = flat.masked_fill(memory.labels != label.unsqueeze(-1), -math.inf)
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
            pyro.sample("z", self.networks.posterior(query, m))


def test_a_choice_before_the_address_is_summed_over(setting):
    """A class and then its entry are the flat address in two steps: every figure of the address is the same."""
    model, guide, memory, x = setting
    with torch.no_grad():  # away from a posterior that is nearly uniform
        guide.similarity.log_scale.fill_(4.0)
    model2, guide2 = Hierarchical(model.networks), HierarchicalGuide(guide.networks, similarity=guide.similarity)
    flat, deep = (address_posterior(g, memory, x) for g in (guide, guide2))
    assert flat.max() > 0.5
    torch.testing.assert_close(deep, flat)
    torch.testing.assert_close(classify(guide2, memory, x), classify(guide, memory, x))
    flat, deep = (kl_report(*pair, memory, x, num_samples=3000) for pair in ((model, guide), (model2, guide2)))
    assert deep.kl_address == pytest.approx(flat.kl_address, rel=1e-5)
    assert deep.perplexity == pytest.approx(flat.perplexity, rel=1e-5)
    assert deep.mutual_information == pytest.approx(flat.mutual_information, rel=1e-4)
    assert deep.nll.mean == pytest.approx(flat.nll.mean, abs=0.1)
    assert deep.kl_z.mean == pytest.approx(flat.kl_z.mean, rel=0.02)
    exact = [
        log_likelihood(*p, memory, x, num_samples=500, address="exact").mean()
        for p in ((model, guide), (model2, guide2))
    ]
    assert exact[1] == pytest.approx(exact[0].item(), abs=0.1)


@pytest.mark.parametrize(
    "q",
    [
        torch.full((3, 5), math.nan),
        torch.full((3, 5), 0.3),
        torch.tensor([[1.5, -0.5]]),
        torch.full((0, 5), 0.2),
        torch.full((2, 3, 5), 0.2),
        torch.tensor([0.5, 0.5]),
    ],
)
def test_what_is_no_probability_has_no_mutual_information(q):
    with pytest.raises(ValueError, match="^q: expected probabilities"):
        mutual_information(q)


def test_mutual_information_of_probabilities_that_float32_cannot_divide():
    q = torch.zeros(100, 3)
    q[:, 0], q[0, 1] = 1, 1e-45
    assert mutual_information(q).mean == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.eye(4)).mean == pytest.approx(math.log(4))


def test_a_report_of_addresses_in_bfloat16(random_images):
    """Their probabilities add up to 1 to two digits."""
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)

    class Rounded(nn.Module):
        def forward(self, query, keys):
            return (query @ keys.transpose(-1, -2)).bfloat16()

    report = kl_report(
        Model(networks),
        Guide(networks, similarity=Rounded()),
        Memory(random_images(50)),
        random_images(3),
        num_samples=2,
    )
    assert 0 <= report.mutual_information.mean < math.log(3)


@pytest.mark.parametrize(("size", "expected"), [(11, 10), (2, 1)])
def test_what_is_left_out_is_no_entry_of_a_report(size, expected, random_images):
    torch.manual_seed(1)
    networks, entries, x = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6), random_images(size), random_images(3)
    model, guide, left_out = Model(networks), RetrievalGuide(networks, candidates=4), torch.tensor([0, 1, 0])
    report = kl_report(model, guide, BankMemory(KeyedBank(entries), left_out=left_out), x, num_samples=2)
    assert report.log_memory == pytest.approx(math.log(expected))
    mask = torch.ones(3, size, dtype=torch.bool).scatter(1, left_out[:, None], False)
    own = Memory(entries.expand(3, -1, -1, -1, -1), mask=mask)
    same = kl_report(model, Guide(networks), own, x, num_samples=2)
    assert same.log_memory == pytest.approx(report.log_memory)
    share = report.kl_address.mean / math.log(expected) if expected > 1 else 0
    assert report.kl_address_share.mean == pytest.approx(share, abs=1e-6)


def test_two_choices_before_the_address():
    """KL(q(b, c, a) || p(b, c, a)) and q(a) against the sum over all outcomes, one program with own tables."""
    torch.manual_seed(3)
    size = {"b": 2, "c": 3, "address": 4}
    tables = {which: [torch.randn(*list(size.values())[: n + 1]) for n in range(3)] for which in "pq"}

    def program(which):
        def run(memory, x):
            with pyro.plate("data", len(x), dim=-1):
                first, second, third = tables[which]
                b = pyro.sample("b", dist.Categorical(logits=first))
                c = pyro.sample("c", dist.Categorical(logits=second[b]))
                a = pyro.sample("address", dist.Categorical(logits=third[b, c]))
                z = pyro.sample("z", dist.Normal(a.float(), 1.0))
                if which == "p":
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    def joint(which):
        first, second, third = (table.log_softmax(-1) for table in tables[which])
        return first[:, None, None] + second[:, :, None] + third

    x = torch.randn(5)
    log_q, log_p = joint("q"), joint("p")
    report = kl_report(program("p"), program("q"), torch.zeros(4), x, num_samples=2)
    expected = (log_q.exp() * (log_q - log_p)).sum()
    assert report.kl_address.mean == pytest.approx(expected.item(), rel=1e-5)
    found = address_posterior(program("q"), torch.zeros(4), x)
    torch.testing.assert_close(found, log_q.exp().sum((0, 1)).expand(5, -1))
