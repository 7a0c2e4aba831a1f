"""The guide of a large memory: a valid bound under any keys, exact gradients, entries left out, keys kept."""

import copy
import math
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from vma_pyro import Guide, InnerProduct, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro.data import EpisodeSampler, LeaveOneOutSampler, RecallSampler, glyphs
from vma_pyro.evaluation import address_posterior, log_likelihood, split_bound
from vma_pyro.infer import compare, log_weights, make
from vma_pyro.memory import BankMemory, KeyedBank, Retrieved
from vma_pyro.memory.nearest import nearest
from vma_pyro.proposal import DefensiveCategorical
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training import TrainConfig, fit

N, S, B, K, E = 13, 11, 3, 2, 5
ROWS = torch.tensor([0, 12, 3, 4, 1, 6, 7, 9, 10, 11, 2])  # of the bank; S of them
OUT = torch.tensor([1, 10, 4])


class Weighted(nn.Module):
    """A prior that is not uniform, and not of what the entries hold."""

    def __init__(self, size=S):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, memory):
        assert memory.size == len(self.logits)
        return self.logits


class WithoutZ(Model):
    """The model at the mean of p(z | m): its bound is a finite sum over addresses."""

    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            logits = memory.masked(self.address_prior(memory))
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
            z = self.networks.prior(m).mean
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)


class GuideWithoutZ(RetrievalGuide):
    def forward(self, memory, x):
        memory, x, data = self.opened(memory, x)
        with data:
            pyro.sample("address", self.proposal(memory, self.networks.query(x)))


def programs(kind=Model, *, prior=True, **options):
    torch.manual_seed(2)
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=E).double()
    model = kind(networks, address_prior=Weighted() if prior else None)
    options = {"candidates": 4, "least": 2, "share": 0.2} | options
    guide = (RetrievalGuide if kind is Model else GuideWithoutZ)(networks, **options)
    return model.double(), guide.double()


@pytest.fixture
def images(random_images):
    return random_images(N).double()


@pytest.fixture
def x(images):
    return images[ROWS][OUT]


def bank(images, **options):
    return KeyedBank(images, torch.arange(N) % 4, **{"key_dtype": torch.float32} | options)


def memory_of(bank, *, left_out=False):
    return BankMemory(bank, ROWS, OUT if left_out else None)


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
        model, guide, (memory, x), estimators={"vimco": make("vimco", K)}, draws=200, show_progress=False
    )
    for row in table.rows:
        assert row.reference == "exact, by enumeration"
        assert row.bias_z < 4.5, row


def every_trained_parameter_has_a_gradient(loss_fn):
    return [n for n, p in loss_fn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


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
    assert every_trained_parameter_has_a_gradient(loss_fn) == []


def test_under_objectives_of_pyro_that_prepare_nothing(images, x):
    model, guide = programs()
    loss_fn = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    loss_fn(memory_of(bank(images)), x).backward()
    assert every_trained_parameter_has_a_gradient(loss_fn) == []


def test_what_is_read_is_encoded_once_and_is_what_the_whole_memory_would_give(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    whole = Memory(images[ROWS]).encode(model.networks)
    found = guide.prepare(memory, x).args[0]
    assert isinstance(found, Retrieved) and found.size == S and found.is_shared
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
    assert memory.lead == (B, S) and not memory.is_shared and memory.num_entries.tolist() == [S - 1] * B
    assert memory.labels.tolist() == [(ROWS % 4).tolist()] * B
    assert memory.entries.shape == (B, S, 1, 28, 28)
    found = guide.prepare(memory, x).args[0]
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
    with pytest.raises(ValueError, match="site 'address': expected no probability on the entries that are left out"):
        model(memory_of(bank(images), left_out=True), x)


def test_keys_are_renewed_every_r_updates_and_where_they_were_encoded(images, x, monkeypatch):
    model, guide = programs()
    monkeypatch.setattr("vma_pyro.memory.keyed.SHORTEST_WAIT", 3)
    kept = bank(images)
    loss_fn = make("vimco", K)(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), 0.05)
    renewed = []
    for update in range(7):
        before = None if kept.keys is None else kept.keys.clone()
        now, centre = kept.keys_by(guide.networks, guide.similarity)  # of the weights before this update
        optimizer.zero_grad()
        loss_fn(memory_of(kept), x).backward()
        assert kept.refreshed == update - update % 3
        if update % 3 == 0:
            before = now  # all of them; those that are encoded then move with the centre
        changed = (kept.keys != before).any(1)
        assert 0 < int(changed.sum()) <= B * guide.least + 1
        expected = guide.similarity.embed(guide.networks.encode(images).key, kept.centre).float()
        assert torch.allclose(kept.keys[changed], expected[changed], atol=1e-6)
        assert not torch.equal(kept.centre, centre)
        renewed.append(changed)
        optimizer.step()
    assert kept.updates == 7
    assert bool(torch.stack(renewed).any(0)[ROWS].any())


def test_an_evaluation_leaves_the_keys_alone_and_other_networks_make_their_own(images, x):
    model, guide = programs()
    kept = bank(images)
    make("vimco", K)(model, guide)(memory_of(kept), x)
    before = copy.deepcopy(kept.state_dict())
    others = copy.deepcopy(guide)
    with torch.no_grad():
        for p in others.parameters():
            p.mul_(-0.7)
    with torch.no_grad():
        near = [g.prepare(memory_of(kept), x).args[0].addresses for g in (guide, others)]
        kept.keys_by = None  # the guide in training needs none
        again = guide.prepare(memory_of(kept), x).args[0].addresses
    assert torch.equal(near[0], again) and not torch.equal(near[0], near[1])
    state = kept.state_dict()
    assert (state["updates"], state["cursor"]) == (before["updates"], before["cursor"])
    assert torch.equal(state["kept"]["keys"], before["kept"]["keys"])


def test_candidates_are_filled_up_in_turn(images, x):
    _, guide = programs(candidates=9, least=1)
    kept = bank(images)
    seen = []
    for _ in range(4):
        found = guide.prepare(BankMemory(kept), x).args[0]
        assert len(found.addresses) == 9
        seen.append(found.addresses)
    assert len(torch.cat(seen).unique()) == N


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
    whole = Memory(images[ROWS])
    parts = split_bound(model, guide, memory, x)
    assert parts.address_probs.shape == (B, S) and parts.how["address"] == "exact"
    model, guide = programs(WithoutZ)
    expected = exact(model, memory, x)
    assert torch.allclose(log_likelihood(model, guide, memory, x, num_samples=1, address="exact"), expected)
    assert torch.allclose(log_likelihood(model, guide, memory, x, num_samples=4000), expected, atol=0.3)


def test_a_small_memory_is_encoded_whole(images, x):
    _, guide = programs(candidates=S)
    found = guide.prepare(memory_of(bank(images)), x).args[0]
    assert found.addresses.tolist() == list(range(S))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    for size, number in ((5, 5), (16, 3), (133, 7), (9001, 4)):
        keys = nn.functional.normalize(torch.randn(size, 6, generator=generator), dim=-1).to(dtype)
        query = torch.randn(B, 6, generator=generator)
        products = query @ keys.float().T
        assert torch.equal(nearest(query, keys, number), products.topk(number).indices)
        if number < size:
            out = products.argmax(1)
            products.scatter_(1, out[:, None], -math.inf)
            assert torch.equal(nearest(query, keys, number, left_out=out), products.topk(number).indices)


def test_what_cannot_be_done_is_refused_in_one_line(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    networks = guide.networks
    cases = [
        (lambda: Guide(networks)(memory, x), "memory.features: expected a memory whose entries are all encoded"),
        (
            lambda: Model(networks, address_prior=LearnedAddress(networks).double())(memory, x),
            "memory.features: expected a memory whose entries are all encoded, got one of a bank of 11, of which 0",
        ),
        (
            lambda: memory.encode(networks).read(torch.full((B, S), 0.1)),
            "address: expected addresses, as a soft read encodes all of a bank, got weights",
        ),
        (lambda: RetrievalGuide(networks, similarity=nn.Bilinear(2, 2, 1)), "similarity: expected `embed`"),
        (lambda: RetrievalGuide(networks, candidates=0), "candidates: expected at least 1, got 0"),
        (lambda: RetrievalGuide(networks, share=1.0), "share: expected between 0 and 1"),
        (lambda: BankMemory(memory.bank, torch.tensor([0, N])), "rows: expected 0 to 12, entries of the bank, got 0 to 13"),
        (lambda: BankMemory(memory.bank, left_out=torch.tensor([-1])), "left_out: expected 0 to 12, addresses of"),
        (lambda: BankMemory(memory.bank, ROWS[:1], torch.tensor([0])), "left_out: expected an entry beside the one"),
        (lambda: BankMemory(memory.bank, ROWS, OUT).read(torch.zeros(2, dtype=torch.long)), "address: expected shape"),
        (lambda: KeyedBank(images, refresh_every=0), "refresh_every: expected at least 1 update, got 0"),
        (lambda: KeyedBank(images, key_dtype=torch.float64), "key_dtype: expected torch.float32 or torch.bfloat16"),
        (lambda: KeyedBank(images[None]), "entries: expected one bank"),
        (lambda: bank(images).load_state_dict(state_of(images[1:], guide)), "keys: expected 13, one for each entry, got 12"),
        (lambda: guide(BankMemory(memory.bank, ROWS, OUT), x[:2]), "x: expected 3 datapoints, one per memory, got 2"),
        (lambda: nearest(torch.zeros(1, 2), torch.zeros(3, 2), 4), "number: expected 1 to 3, as many as there are"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError) as error:
            function()
        assert str(error.value).startswith(message), error.value
        assert "\n" not in str(error.value)


def state_of(images, guide):
    other = KeyedBank(images)
    other.begin_update(guide.networks, guide.similarity)
    return other.state_dict()


def test_an_inner_product_serves_as_well(images, x):
    model, guide = programs(similarity=InnerProduct())
    loss_fn = make("vimco", K)(model, guide)
    loss_fn(memory_of(bank(images)), x).backward()
    assert every_trained_parameter_has_a_gradient(loss_fn) == []


def test_bytes_are_entries_like_any(images, x):
    model, guide = programs()
    kept = KeyedBank(images.to(torch.uint8))
    found = guide.prepare(BankMemory(kept, ROWS), x).args[0]
    assert found.dtype == torch.float64
    assert torch.allclose(
        found.candidates.key, guide.networks.encode(images[ROWS][found.addresses]).key, atol=1e-12
    )
    assert isinstance(poutine.trace(guide).get_trace(found, x).nodes["address"]["fn"], DefensiveCategorical)


def trained(folder, images, *, left_out=False, resume=False, **options):
    torch.manual_seed(0)
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=E)
    model, guide = Model(networks), RetrievalGuide(networks, candidates=6, least=2)
    if left_out:
        episodes = LeaveOneOutSampler(images, classes=5, shots=3, queries=4, seed=0, refresh_every=4)
    else:
        episodes = RecallSampler(images.images.reshape(-1, 28, 28), size=17, queries=4, seed=0, refresh_every=4)
    plain = EpisodeSampler(images, classes=3, shots=2, queries=4, seed=1).sample()
    steps = {"updates": 11, "log_every": 3, "validate_every": 5, "warmup_updates": 2, "validation_samples": 2}
    config = TrainConfig(**steps, accelerator="cpu", capture=True, checkpoint_seconds=1e9)
    elbo = make("vimco", K)
    result = fit(
        model, guide, elbo, episodes, config=config, folder=folder, validation=[plain], resume=resume,
        show_progress=False, **options,
    )
    return result, episodes.bank, {n: p.detach().clone() for n, p in elbo(model, guide).named_parameters()}


@pytest.mark.parametrize("left_out", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, left_out):
    images = glyphs.load(classes=7, examples=5)
    _, kept, expected = trained(tmp_path / "whole", images, left_out=left_out)
    kind = LeaveOneOutSampler if left_out else RecallSampler
    draw, drawn = kind.sample, []

    def stopping(sampler):
        drawn.append(sampler)
        if len(drawn) == 7:  # in the midst of two refreshes
            signal.raise_signal(signal.SIGTERM)
        return draw(sampler)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "sample", stopping)
        result, _, _ = trained(tmp_path / "parts", images, left_out=left_out)
    assert result.interrupted and 0 < result.updates < 11
    result, again, weights = trained(tmp_path / "parts", images, left_out=left_out, resume=True)
    assert result.updates == 11
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(again.keys, kept.keys) and (again.updates, again.cursor) == (kept.updates, kept.cursor) 


def test_networks_that_are_edited_between_updates_are_seen_by_the_next(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    loss_fn = make("vimco", K)(model, guide)
    loss_fn(memory, x).backward()
    with torch.no_grad():
        for p in guide.networks.parameters():
            p.add_(0.3 * torch.randn_like(p))
    found = guide.prepare(memory, x).args[0]
    expected = guide.networks.encode(images[ROWS][found.addresses])
    assert torch.equal(found.candidates.key, expected.key)
    read, heads = found.read(found.addresses[:1]), guide.networks.heads(expected)
    assert torch.allclose(read.hidden, heads.hidden[:1], atol=1e-12)
