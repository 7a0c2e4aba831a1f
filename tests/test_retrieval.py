"""The guide of a large memory: a valid bound under any keys, exact gradients, entries left out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from banks import (
    OUT,
    ROWS,
    B,
    E,
    K,
    N,
    S,
    WithoutZ,
    bank,
    memory_of,
    programs,
    without_a_gradient,
)
from pyro import poutine
from pyro.infer import Trace_ELBO

from vma_pyro import Guide, InnerProduct, Memory, Model
from vma_pyro.evaluation import address_posterior, log_likelihood, split_bound
from vma_pyro.infer import compare, log_weights, make
from vma_pyro.memory import KeyedBank, Retrieved


@pytest.fixture
def images(random_images):
    return random_images(N).double()


@pytest.fixture
def x(images):
    return images[ROWS][OUT]


def exact(model, memory, x):
    """log p(x | M), with the address summed: the model has no z."""
    plain = Memory(memory.bank.memory.entries[memory.rows])
    log_p = memory.masked(model.address_prior(plain.encode(model.networks))).log_softmax(-1)
    at = torch.arange(S).reshape(S, 1).expand(S, B)
    trace = poutine.trace(poutine.condition(model, data={"address": at})).get_trace(plain, x)
    trace.compute_log_prob()
    return torch.logsumexp(log_p.expand(B, S).T + trace.nodes["x"]["log_prob"], 0)


class Frozen(KeyedBank):
    """Keys that no update changes."""

    def begin_update(self, networks, similarity):
        if self.keys is None:
            super().begin_update(networks, similarity)

    def replace(self, rows, keys, similarity):
        pass


def frozen(images, guide, kind):
    found = Frozen(images, key_dtype=torch.float32)
    found.begin_update(guide.networks, guide.similarity)
    if kind == "garbage":
        found.keys = torch.randn(N, E, generator=torch.Generator().manual_seed(5))
    return found


@pytest.mark.parametrize("keys", ["fresh", "garbage"])
@pytest.mark.parametrize("left_out", [False, True])
def test_the_expected_weight_is_the_likelihood_whatever_the_keys(images, x, keys, left_out):
    model, guide = programs(WithoutZ)
    memory = memory_of(frozen(images, guide, keys), left_out=left_out)
    with torch.no_grad():
        expected = exact(model, memory, x)
        memory = guide.prepare(memory, x).args[0]
        q = poutine.trace(guide).get_trace(memory, x).nodes["address"]["fn"]
        at = q.enumerate_support()
        log_q = q.log_prob(at)
        given = poutine.condition(model, data={"address": at})
        trace = poutine.trace(given).get_trace(memory, x)
        trace.compute_log_prob()
        log_w = trace.nodes["address"]["log_prob"] + trace.nodes["x"]["log_prob"] - log_q
    # The sum of q w over all addresses, what is left out among them with none: exact to the last digits.
    possible = log_q > -math.inf
    terms = torch.where(possible, log_q + log_w, -math.inf)
    assert torch.allclose(terms.logsumexp(0), expected, atol=1e-12)
    bound = torch.where(possible, log_q.exp() * log_w, 0.0).sum(0)
    assert bool((bound <= expected + 1e-12).all())


@pytest.mark.parametrize("keys", ["fresh", "garbage"])
def test_a_bound_of_several_samples_stays_below_the_likelihood(images, x, keys):
    model, guide = programs(WithoutZ)
    memory = memory_of(frozen(images, guide, keys))
    expected = exact(model, memory, x).detach()
    log_w = [log_weights(model, guide, (memory, x), num_particles=K) for _ in range(100)]
    bounds = torch.stack(log_w).logsumexp(1) - math.log(K)  # [trials, B]
    error = bounds.std(0) / len(bounds) ** 0.5
    assert bool((bounds.mean(0) < expected + 4 * error).all())


@pytest.mark.parametrize("left_out", [False, True])
def test_the_gradient_is_that_of_the_expected_bound(images, x, left_out):
    model, guide = programs(WithoutZ)
    memory = memory_of(frozen(images, guide, "garbage"), left_out=left_out)
    table = compare(
        model, guide, (memory, x), estimators={"vimco": make("vimco", K)}, draws=100, show_progress=False
    )
    for row in table.rows:
        assert row.reference == "exact, by enumeration"
        assert row.bias_z < 4.5, row


NAMES = ("vimco", "vimco+dreg", "vimco+dreg+resampled", "rloo", "reinforce", "ovis", "nvil", "wake-wake", "tvo")


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_trains_all_parameters(images, x, name, left_out):
    model, guide = programs()
    loss_fn = make(name, K + 2)(model, guide)
    memory = memory_of(bank(images), left_out=left_out)
    loss = loss_fn(memory, x)
    loss.backward()
    assert bool(loss.isfinite())
    assert without_a_gradient(loss_fn) == []


def test_under_objectives_of_pyro_that_prepare_nothing(images, x):
    model, guide = programs()
    loss_fn = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    loss_fn(memory_of(bank(images)), x).backward()
    assert without_a_gradient(loss_fn) == []


def test_what_is_read_is_encoded_once_and_is_what_the_whole_memory_would_give(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    whole = Memory(images[ROWS]).encode(model.networks)
    found = guide.prepare(memory, x).args[0]
    assert isinstance(found, Retrieved)
    assert found.size == S
    assert found.is_shared
    assert 4 <= len(found.addresses) <= B * guide.least  # of 4 in all, 2 for each
    address = torch.arange(S).repeat(2, 1)
    for part, expected in zip(found.read(address)[:3], whole.read(address)[:3], strict=True):
        assert torch.allclose(part, expected, atol=1e-12)
    assert found.read(address) is found.read(address)
    trace = poutine.trace(guide).get_trace(found, x)
    assert poutine.replay(model, trace=trace)(found, x).shape == x.shape


def test_an_entry_that_is_left_out_is_never_found_drawn_or_possible(images, x):
    model, guide = programs()
    memory = memory_of(bank(images), left_out=True)
    assert memory.lead == (B, S)
    assert not memory.is_shared
    assert memory.num_entries.tolist() == [S - 1] * B
    assert memory.labels.tolist() == [(ROWS % 4).tolist()] * B
    assert memory.entries.shape == (B, S, 1, 28, 28)
    found = guide.prepare(memory, x).args[0]
    assert found.num_entries.tolist() == [S - 1] * B
    q = poutine.trace(guide).get_trace(found, x).nodes["address"]["fn"]
    drawn = q.sample([5000])
    assert not bool((drawn == OUT).any())
    assert all(len(column.unique()) == S - 1 for column in drawn.T)
    p = poutine.trace(model).get_trace(found, x).nodes["address"]["fn"]
    assert bool((p.log_prob(OUT) == -math.inf).all())
    probs = address_posterior(guide, found, x)
    assert torch.allclose(probs.sum(1), torch.ones(B, dtype=torch.float64))
    assert bool((probs.gather(1, OUT[:, None]) == 0).all())
    assert not bool(
        (guide.networks.query(x).key - guide.networks.encode(images[ROWS][OUT]).key).abs().sum() > 0
    )  # each target is the entry that is left out


class Forgetful(Model):
    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            m = memory.read(pyro.sample("address", dist.Categorical(logits=self.address_prior(memory))))
            return pyro.sample("x", self.likelihood(self.networks.decode(self.networks.prior(m).mean, m)), obs=x)


def test_a_program_that_forgets_what_is_left_out_is_refused(images, x):
    model, guide = programs(Forgetful, prior=False)
    with pytest.raises(
        ValueError, match="site 'address': expected no probability on the entries that are left out"
    ):
        model(memory_of(bank(images), left_out=True), x)


def test_with_a_memory_of_no_bank_it_is_the_guide(images, x):
    model, guide = programs()
    plain = Guide(guide.networks, similarity=guide.similarity)
    memory = Memory(images[ROWS])
    bounds = [log_likelihood(model, g, memory, x, num_samples=3) for g in (guide, plain)]
    assert torch.equal(*bounds)
    own = Memory(images[ROWS].expand(B, *images[ROWS].shape).contiguous())
    assert torch.equal(*[split_bound(model, g, own, x).address_probs for g in (guide, plain)])


def test_evaluation_of_a_bank_by_its_own_proposal(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    parts = split_bound(model, guide, memory, x)
    assert parts.address_probs.shape == (B, S)
    assert parts.how["address"] == "exact"
    model, guide = programs(WithoutZ)
    expected = exact(model, memory, x)
    assert torch.allclose(log_likelihood(model, guide, memory, x, num_samples=1, address="exact"), expected)
    assert torch.allclose(log_likelihood(model, guide, memory, x, num_samples=4000), expected, atol=0.3)


def test_an_inner_product_serves_as_well(images, x):
    model, guide = programs(similarity=InnerProduct())
    loss_fn = make("vimco", K)(model, guide)
    loss_fn(memory_of(bank(images)), x).backward()
    assert without_a_gradient(loss_fn) == []
