"""A bank with kept keys: when they are renewed, what is found by them, what a resumed run finds."""

import copy
import math
import pickle
import re
import signal

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
    bank,
    memory_of,
    programs,
)
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader

from vma_pyro import Guide, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro.data import EpisodeSampler, LeaveOneOutSampler, RecallSampler, glyphs
from vma_pyro.evaluation import address_posterior
from vma_pyro.infer import make
from vma_pyro.memory import BankMemory, KeyedBank
from vma_pyro.memory.nearest import nearest
from vma_pyro.proposal import DefensiveCategorical
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training import TrainConfig, fit


@pytest.fixture
def images(random_images):
    return random_images(N).double()


@pytest.fixture
def x(images):
    return images[ROWS][OUT]


def test_keys_are_renewed_every_r_updates_and_where_they_were_encoded(images, x, monkeypatch):
    model, guide = programs()
    monkeypatch.setattr("vma_pyro.memory.keyed.SHORTEST_WAIT", 3)
    monkeypatch.setattr("vma_pyro.memory.keyed.LEAST_LIKENESS", 0.0)
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
    assert torch.equal(near[0], again)
    assert not torch.equal(near[0], near[1])
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


def state_of(images, guide):
    other = KeyedBank(images)
    other.begin_update(guide.networks, guide.similarity)
    return other.state_dict()


def test_what_cannot_be_done_is_refused_in_one_line(images, x):
    model, guide = programs()
    memory = memory_of(bank(images))
    networks = guide.networks
    cases = [
        (lambda: Guide(networks)(memory, x), "memory.features: expected a memory whose entries are all encoded"),
        (
            lambda: Model(networks, address_prior=LearnedAddress(networks).double())(memory, x),
            "memory.features: expected a memory whose entries are all encoded, got one of a bank of 11, of which",
        ),
        (
            lambda: memory.encode(networks).read(torch.full((B, S), 0.1)),
            "address: expected addresses, as a soft read encodes all of a bank, got weights",
        ),
        (lambda: RetrievalGuide(networks, similarity=nn.Bilinear(2, 2, 1)), "similarity: expected `embed`"),
        (lambda: RetrievalGuide(networks, candidates=0), "candidates: expected at least 1, got 0"),
        (lambda: RetrievalGuide(networks, share=1.0), "share: expected between 0 and 1"),
        (
            lambda: BankMemory(memory.bank, torch.tensor([0, N])),
            "rows: expected 0 to 12, entries of the bank, got 0 to 13",
        ),
        (lambda: BankMemory(memory.bank, left_out=torch.tensor([-1])), "left_out: expected 0 to 12, addresses of"),
        (
            lambda: BankMemory(memory.bank, ROWS[:1], torch.tensor([0])),
            "left_out: expected an entry beside the one",
        ),
        (
            lambda: BankMemory(memory.bank, ROWS, OUT).read(torch.zeros(2, dtype=torch.long)),
            "address: expected shape",
        ),
        (lambda: KeyedBank(images, refresh_every=0), "refresh_every: expected at least 1, got 0"),
        (lambda: KeyedBank(images, refresh_every=2.5), "refresh_every: expected an int, got 2.5"),
        (lambda: KeyedBank(images, refresh_every=math.nan), "refresh_every: expected an int, got nan"),
        (lambda: BankMemory(memory.bank, ROWS.float()), "rows: expected int64, got torch.float32"),
        (lambda: BankMemory(memory.bank, ROWS > 3), "rows: expected int64, got torch.bool"),
        (
            lambda: BankMemory(memory.bank, ROWS, OUT.to(torch.uint8)),
            "left_out: expected int64, got torch.uint8",
        ),
        (
            lambda: BankMemory(memory.bank, ROWS, OUT.double()),
            "left_out: expected int64, got torch.float64",
        ),
        (
            lambda: KeyedBank(images, key_dtype=torch.float64),
            "key_dtype: expected torch.float32 or torch.bfloat16",
        ),
        (lambda: KeyedBank(images[None]), "entries: expected one bank"),
        (
            lambda: bank(images).load_state_dict(state_of(images[1:], guide)),
            "keys: expected 13, one for each entry, got 12",
        ),
        (
            lambda: guide(BankMemory(memory.bank, ROWS, OUT), x[:2]),
            "x: expected 3 datapoints, one per memory, got 2",
        ),
        (
            lambda: nearest(torch.zeros(1, 2), torch.zeros(3, 2), 4),
            "number: expected 1 to 3, as many as there are",
        ),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
            function()
        assert "\n" not in str(error.value)


def test_a_stream_goes_on_from_a_position_of_its_kind():
    characters = glyphs.load(classes=6, examples=4)
    images = characters.images.reshape(-1, 28, 28)
    plain, banked = (RecallSampler(images, size=5, queries=2, seed=0, refresh_every=r) for r in (None, 9))
    left_out = LeaveOneOutSampler(characters, classes=3, shots=2, queries=2, seed=0)
    for stream, state, message in (
        (
            banked,
            plain.state_dict(),
            "refresh_every: expected a saved position with keys of a bank as here, got none",
        ),
        (
            plain,
            banked.state_dict(),
            "refresh_every: expected a saved position with none as here, got keys of a bank",
        ),
        (
            left_out,
            plain.state_dict(),
            "episodes: expected a saved position with keys of a bank as here, got none",
        ),
    ):
        before = copy.deepcopy(stream.state_dict())
        with pytest.raises(ValueError, match=f"^{message}$"):
            stream.load_state_dict(state)
        assert torch.equal(stream.state_dict()["generator"], before["generator"])


@pytest.mark.parametrize(("candidates", "searched"), [(S - 1, True), (S, False), (50, False)])
def test_no_keys_are_made_for_a_memory_that_is_encoded_whole(candidates, searched, images, x):
    model, guide = programs(candidates=candidates, least=2)
    kept = bank(images)
    make("vimco", K)(model, guide)(memory_of(kept), x).backward()
    assert (kept.keys is not None) == searched
    assert kept.updates == searched


def test_a_bank_that_was_trained_with_can_be_pickled(images, x):
    model, guide = programs()
    kept = bank(images)
    make("vimco", K)(model, guide)(memory_of(kept), x).backward()
    copies = {
        "pickled": pickle.loads(pickle.dumps(kept)),
        "copied": copy.copy(kept),
        "copied deeply": copy.deepcopy(kept),
    }
    other = copy.deepcopy(guide)
    for how, again in copies.items():
        assert torch.equal(again.keys, kept.keys)
        assert again.is_trained_with(guide.networks) == (how != "pickled"), how
        before = again.refreshed
        again.begin_update(other.networks, other.similarity)  # keys of others are made anew
        assert again.refreshed > before, how


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
        model,
        guide,
        elbo,
        episodes,
        config=config,
        folder=folder,
        validation=[plain],
        resume=resume,
        show_progress=False,
        **options,
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
    assert result.interrupted
    assert 0 < result.updates < 11
    result, again, weights = trained(tmp_path / "parts", images, left_out=left_out, resume=True)
    assert result.updates == 11
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(again.keys, kept.keys)
    assert (again.updates, again.cursor) == (kept.updates, kept.cursor)


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


def test_a_bank_stays_in_the_process_of_its_training():
    images = glyphs.load(classes=7, examples=5)
    samplers = (
        LeaveOneOutSampler(images, classes=5, shots=3, queries=4, seed=0),
        RecallSampler(images.images.reshape(-1, 28, 28), size=17, queries=4, seed=0, refresh_every=4),
    )
    for sampler in samplers:
        with pytest.raises(ValueError, match="num_workers: expected 0 for a bank with keys"):
            next(iter(DataLoader(sampler, batch_size=None, num_workers=1, multiprocessing_context="fork")))


def test_episodes_leave_out_their_targets_and_nothing_else():
    images = glyphs.load(classes=7, examples=5)
    sampler = LeaveOneOutSampler(images, classes=4, shots=3, queries=5, seed=0)
    for _, episode in zip(range(20), sampler, strict=False):
        memory, own = episode.memory, episode.memory.left_out
        assert memory.lead == (5, 12)
        assert len(memory.rows.unique()) == 12
        assert len((memory.rows // 5).unique()) == 4
        assert torch.equal(memory.entries[0, own].float(), episode.x)
        assert torch.equal(memory.labels[0, own], episode.labels)
        assert len(own.unique()) == 5
    for options, message in (
        ({"classes": 8}, "classes: expected 1 to 7, the classes of the data set, got 8"),
        ({"shots": 1}, "shots: expected 2 to 5, the examples of a class, of which one may be left out, got 1"),
        ({"queries": 13}, "queries: expected 1 to 12, the entries of the memory, got 13"),
    ):
        with pytest.raises(ValueError, match=message):
            LeaveOneOutSampler(images, **{"classes": 4, "shots": 3, "queries": 5, "seed": 0} | options)


def test_keys_that_have_changed_at_a_stroke_are_renewed_at_once(images, x, monkeypatch):
    monkeypatch.setattr("vma_pyro.memory.keyed.SHORTEST_WAIT", 2)
    _, guide = programs()
    kept = bank(images)
    kept.updates = 1000  # they are due in 125 updates
    for update in range(6):
        guide.prepare(memory_of(kept), x)
        if update == 3:
            with torch.no_grad():
                guide.networks.to_key.weight.mul_(-1)  # seen in the update after this one
    assert kept.refreshed == 1005


@pytest.mark.parametrize("size", [17, 35])
def test_targets_of_recall_have_the_labels_of_their_entries(size):
    images = glyphs.load(classes=7, examples=5).images.reshape(-1, 28, 28)
    episode = RecallSampler(images, size=size, queries=4, seed=0, refresh_every=4).sample()
    at = (episode.memory.labels == episode.labels.unsqueeze(1)).nonzero()[:, 1]
    assert episode.memory.size == size
    assert torch.equal(episode.memory.entries[at].float(), episode.x)


def test_keys_of_other_networks_are_made_anew(images, x):
    first, second = programs()[1], programs()[1]
    with torch.no_grad():
        second.networks.to_key.weight.mul_(-1)
    kept = bank(images)
    for guide in (first, second):
        expected, _ = kept.keys_by(guide.networks, guide.similarity)
        found = guide.prepare(memory_of(kept), x).args[0]
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[ROWS[found.addresses]] = False
        assert torch.equal(kept.keys[untouched], expected[untouched])


class InHalf(MLPNetworks):
    """Its keys are of what type layers compute in, as those of one's own networks are."""

    def _keyed(self, features):
        return features._replace(key=features.key.bfloat16())

    def encode(self, entries):
        return self._keyed(super().encode(entries))

    def query(self, x):
        return self._keyed(super().query(x))


def test_keys_of_16_bits_make_probabilities_of_32(images, x):
    torch.manual_seed(0)
    networks = InHalf(3, hidden_dims=(8, 7), key_dim=6)
    images, x = images.float(), x.float()
    guide, kept = RetrievalGuide(networks, candidates=8, least=2), KeyedBank(images)
    for _ in range(3):  # the mean key moves with what is encoded
        memory = guide.prepare(BankMemory(kept), x).args[0]
    assert kept.centre.dtype == torch.float32
    q = guide.proposal(memory, networks.query(x))
    log_q = q.log_prob(torch.arange(len(images))[:, None])
    assert log_q.dtype == torch.float32
    assert torch.allclose(log_q.logsumexp(0), torch.zeros(len(x)), atol=1e-5)
    found = address_posterior(Guide(networks), Memory(images), x)
    assert torch.allclose(found.sum(1), torch.ones(len(x), dtype=found.dtype), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: RetrievalGuide(programs()[1].networks, least=2.5), "^least: expected an int, got 2.5$"),
        (
            lambda images: RetrievalGuide(programs()[1].networks, candidates=3.0),
            "^candidates: expected an int, got",
        ),
        (lambda images: BankMemory(KeyedBank(images), [1, 2]), "^rows: expected int64, got list$"),
        (
            lambda images: KeyedBank(images, torch.zeros(len(images))),
            "^memory.labels: expected int64, got torch.fl",
        ),
        (
            lambda images: Memory(images, torch.ones(len(images)).bool()),
            "^memory.labels: expected int64, got torch.b",
        ),
    ],
)
def test_what_counts_is_whole(make, message, images):
    with pytest.raises(ValueError, match=message):
        make(images)


@pytest.mark.parametrize("change", [{"size": 5.0}, {"queries": 2.5}])
def test_sizes_of_episodes_are_whole(change):
    images = glyphs.load(classes=7, examples=5)
    with pytest.raises(ValueError, match="^(size|queries): expected an int, got "):
        RecallSampler(images.images.reshape(-1, 28, 28), **({"size": 6, "queries": 2, "seed": 0} | change))
    for sampler in (EpisodeSampler, LeaveOneOutSampler):
        with pytest.raises(ValueError, match="^classes: expected an int, got 2.0$"):
            sampler(images, classes=2.0, shots=2, queries=2, seed=0)


def test_images_of_recall_may_lie_in_any_order():
    images = glyphs.load(classes=7, examples=5).images.reshape(-1, 28, 28)
    found = RecallSampler(images[::-1], size=5, queries=2, seed=0).sample()
    expected = RecallSampler(images[::-1].copy(), size=5, queries=2, seed=0).sample()
    assert torch.equal(found.x, expected.x)
