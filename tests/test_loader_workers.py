"""Streams of episodes in the workers of a `DataLoader`: what one process would draw, each episode once."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from vma_pyro.data import EpisodeSampler, NestedEpisodes, RecallSampler, glyphs

CHARACTERS = glyphs.load(classes=6, examples=5)
STREAMS = {
    "one memory": lambda: EpisodeSampler(CHARACTERS, classes=3, shots=2, queries=4, seed=0),
    "a memory each": lambda: EpisodeSampler(
        CHARACTERS, classes=3, shots=2, queries=4, seed=1, shared_memory=False
    ),
    "recall": lambda: RecallSampler(CHARACTERS.images.reshape(-1, 28, 28), size=5, queries=2, seed=2),
}


class Wrapped(IterableDataset):
    """A data set of a user's own."""

    def __init__(self, episodes):
        self.episodes = episodes

    def __iter__(self):
        return iter(self.episodes())


def same(ours, theirs):
    """Whether two lists hold the same episodes in the same order."""
    pairs = [(a.memory.entries, b.memory.entries) for a, b in zip(ours, theirs, strict=True)]
    pairs += [(a.x, b.x) for a, b in zip(ours, theirs, strict=True)]
    pairs += [(a.memory.labels, b.memory.labels) for a, b in zip(ours, theirs, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def first(number, stream):
    return [episode for _, episode in zip(range(number), stream, strict=False)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("kind", STREAMS)
def test_forked_workers_share_the_stream(kind, workers):
    alone = first(7, STREAMS[kind]())
    assert len({episode.x.numpy().tobytes() for episode in alone}) == 7
    options = {"batch_size": None, "num_workers": workers}
    options |= {"multiprocessing_context": "fork"} if workers else {}
    assert same(first(7, DataLoader(STREAMS[kind](), **options)), alone)
    assert same(first(7, DataLoader(Wrapped(STREAMS[kind]().__iter__), **options)), alone)


def test_a_spawned_worker():
    """One, as each takes seconds to import torch; how workers share the stream does not depend on their start."""
    loader = DataLoader(STREAMS["one memory"](), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert same(first(5, loader), first(5, STREAMS["one memory"]()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["episodes", "pooled"])
def test_workers_share_out_the_targets(how, workers, monkeypatch):
    nested = NestedEpisodes(CHARACTERS, images=None, seed=0)
    monkeypatch.setattr("vma_pyro.data.nested.MOST_BYTES", 20 * 28 * 28 * 4)  # several parts
    stream = Wrapped(lambda: getattr(nested, how)(3, 2))
    options = {"multiprocessing_context": "fork"} if workers else {}
    loaded = list(DataLoader(stream, batch_size=None, num_workers=workers, **options))
    assert len(loaded) > 2
    found = torch.cat([episode.x for episode in loaded]).flatten(1)
    alone = torch.cat([episode.x for episode in getattr(nested, how)(3, 2)]).flatten(1)
    assert len(found) == len(nested)
    assert sorted(found.tolist()) == sorted(alone.tolist())


@pytest.mark.parametrize("kind", STREAMS)
def test_a_copy_goes_on_from_where_the_stream_is(kind):
    stream = STREAMS[kind]()
    first(2, stream)
    twin = pickle.loads(pickle.dumps(stream))
    assert same(first(2, twin), first(4, STREAMS[kind]())[2:])
    assert same(first(2, stream), first(4, STREAMS[kind]())[2:])


@pytest.mark.parametrize("kind", STREAMS)
def test_episodes_are_not_put_together(kind):
    with pytest.raises(
        ValueError,
        match=r"^batch_size: expected None, as an episode is a batch already, got 2 episodes to put together; "
        r"use DataLoader\(stream, batch_size=None\)$",
    ):
        next(iter(DataLoader(STREAMS[kind](), batch_size=2)))
