"""Classes with different numbers of examples: who is in a memory, who is a query, and what is masked."""

import numpy as np
import pytest
import torch

from vma_pyro import ConvNetworks, DiscretizedLogistics, Guide, Model
from vma_pyro.data import EpisodeSampler, ImageClasses, LeaveOneOutSampler, NestedEpisodes
from vma_pyro.evaluation import classify, kl_report, log_likelihood
from vma_pyro.infer import MultiSampleELBO

COUNTS = [1, 2, 5, 9, 1, 4]
NAMES = tuple(f"c{i}" for i in range(len(COUNTS)))


def data(counts=COUNTS, colours=3, groups=None):
    """Every image says its class and its example in its first two pixels."""
    names = tuple(f"c{i}" for i in range(len(counts)))
    pixels = np.full((sum(counts), colours, 8, 8), 7, np.uint8)
    row = 0
    for c, count in enumerate(counts):
        for e in range(count):
            pixels[row, :, 0, :2] = (10 + c, 10 + e)
            row += 1
    return ImageClasses(pixels, np.array(counts), names, groups or names, bits=8)


def said(images):
    """Class and example of images [..., C, 8, 8]."""
    found = (images[..., 0, 0, :2] * 255).round().long() - 10
    return found[..., 0], found[..., 1]


def episodes(number=40, **options):
    sampler = EpisodeSampler(data(), **({"classes": 4, "shots": 3, "queries": 5, "seed": 0} | options))
    return [sampler.sample() for _ in range(number)]


@pytest.mark.parametrize("shared", [True, False])
def test_memories_hold_what_a_class_can_spare(shared):
    seen = set()
    for e in episodes(shared_memory=shared):
        assert e.x.shape == (5, 3, 8, 8)
        assert e.x.max() <= 1
        for b in range(5):
            memory = e.memory if shared else e.memory.datapoints(slice(b, b + 1))
            lead = memory.lead[-1:]
            mask = torch.ones(lead, dtype=torch.bool) if memory.mask is None else memory.mask.reshape(lead)
            entries = memory.entries.reshape(*lead, 3, 8, 8)
            of, which = said(entries)
            own, example = (value.item() for value in said(e.x[b]))
            labels = memory.labels.reshape(lead)
            for label in range(4):
                here = mask & (labels == label)
                assert len(set(of[here].tolist())) == 1
                count = COUNTS[of[here][0]]
                assert int(here.sum()) == len(set(which[here].tolist())) == min(3, max(1, count - 1))
            assert (own, example) not in set(zip(of[mask].tolist(), which[mask].tolist(), strict=True))
            assert set(of[mask & (labels == e.labels[b])].tolist()) == {own}
            assert COUNTS[own] > 1
            seen.add((own, example))
    assert len(seen) == sum(count for count in COUNTS if count > 1)


def test_queries_of_one_memory_are_distinct_as_long_as_there_are_enough():
    for e in episodes(classes=6, queries=9):
        assert len(set(zip(*(v.tolist() for v in said(e.x)), strict=True))) == 9  # 1 + 2 + 6 + 1 are left
    for e in episodes(classes=1, queries=6):
        left = max(1, COUNTS[said(e.x)[0][0]] - 3)
        assert len(set(said(e.x)[1].tolist())) == min(left, 6)


def test_a_memory_of_single_examples_alone_is_not_drawn():
    counts = [1] * 8 + [2]
    for shared in (True, False):
        sampler = EpisodeSampler(data(counts), classes=2, shots=1, queries=1, seed=0, shared_memory=shared)
        assert all(said(sampler.sample().x)[0].item() == 8 for _ in range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 9}, "shots: expected at most 8, as the largest class has 9 examples and one must be left .*"),
        ({"classes": 7}, "classes: expected at most 6, the classes of the data set, got 7"),
        (
            {"queries": 11},
            "queries: expected at most 10, the examples that 4 classes leave beside 3 shots, got 11",
        ),
    ],
)
def test_more_than_there_is_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        episodes(1, **change)


def test_what_is_not_square_is_not_turned():
    wide = ImageClasses(np.zeros((4, 1, 8, 9), np.uint8), np.array([2, 2]), ("a", "b"), ("a", "b"))
    with pytest.raises(
        ValueError, match="^augment: expected None for images that are not square, 8 x 9, got 'rot"
    ):
        EpisodeSampler(wide, classes=1, shots=1, queries=1, seed=0, augment="rotations")


def test_turned_classes_are_classes():
    sampler = EpisodeSampler(data(), classes=24, shots=1, queries=60, seed=0, augment="rotations")
    corners = sampler.sample().x[..., 0, 0, 0]
    assert 0 < (corners * 255 > 9.5).sum() < 60


def test_streams_go_on_where_they_were():
    for shared in (True, False):
        one = EpisodeSampler(data(), classes=3, shots=2, queries=4, seed=1, shared_memory=shared)
        one.sample()
        state = one.state_dict()
        first = one.sample()
        one.load_state_dict(state)
        second = one.sample()
        assert torch.equal(first.x, second.x)
        assert torch.equal(first.memory.entries, second.memory.entries)


class TestNested:
    def test_targets_under_growing_memories(self):
        nested = NestedEpisodes(data(), images=None, seed=0)
        assert len(nested) == 20  # but for the two single examples
        found = {}
        for shots in (1, 3, 8):
            for e in nested.episodes(4, shots):
                for b in range(len(e.x)):
                    mask = torch.ones(4 * shots, dtype=torch.bool) if e.memory.mask is None else e.memory.mask[b]
                    of, which = said(e.memory.entries[b])
                    own = tuple(value.item() for value in said(e.x[b]))
                    pairs = set(zip(of[mask].tolist(), which[mask].tolist(), strict=True))
                    assert own not in pairs
                    labels = e.memory.labels[b]
                    assert set(of[mask & (labels == e.labels[b])].tolist()) == {own[0]}
                    for c in set(of[mask].tolist()):
                        most = COUNTS[c] - (c == own[0])
                        assert sum(pair[0] == c for pair in pairs) == min(shots, most)
                    found.setdefault(own, []).append(pairs)
        for few, more, most in found.values():
            assert few <= more <= most

    @pytest.mark.parametrize("replacement", [False, True])
    def test_pools(self, replacement):
        nested = NestedEpisodes(data(), images=8, seed=0)
        for e in nested.pooled(3, 2, replacement=replacement):
            of, which = said(e.memory.entries)
            assert bool((which < torch.tensor(COUNTS)[of]).all())
            if not replacement:
                own = torch.stack(said(e.x), -1)[:, None]
                assert not bool((torch.stack([of, which], -1) == own).all(-1).any())

    def test_no_class_has_two(self):
        with pytest.raises(
            ValueError, match="^characters: expected a class with 2 examples or more, as a target is"
        ):
            NestedEpisodes(data([1, 1]), images=None, seed=0)


def test_targets_that_are_left_out():
    with pytest.raises(ValueError, match="^dataset: expected classes of 2 examples or more, .*, got one of 1$"):
        LeaveOneOutSampler(data(), classes=2, shots=2, queries=1, seed=0)
    sampler = LeaveOneOutSampler(data([2, 5, 3]), classes=3, shots=4, queries=6, seed=0)
    e = sampler.sample()
    assert e.memory.size == 9
    of, _ = said(e.x)
    assert e.labels.tolist() == of.tolist()
    assert sampler.bank.memory.entries.max() <= 1


def test_a_model_trains_and_is_measured_on_them():
    """Masks and colours go through the objective, the report and the classification."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8, image_shape=(3, 8, 8))
    model, guide = Model(networks, likelihood=DiscretizedLogistics(2)), Guide(networks)
    for shared in (True, False):
        (e,) = episodes(1, classes=6, shared_memory=shared)
        assert e.memory.mask is not None
        MultiSampleELBO(2)(model, guide)(e.memory, e.x).backward()
        assert kl_report(model, guide, e.memory, e.x, labels=e.labels, num_samples=2).nll.mean > 0
        torch.testing.assert_close(classify(guide, e.memory, e.x).sum(-1), torch.ones(5))
    for e in NestedEpisodes(data(), images=4, seed=0).episodes(6, 4):
        assert log_likelihood(model, guide, e.memory, e.x, num_samples=2).isfinite().all()
