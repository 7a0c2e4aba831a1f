"""One update under a memory of thousands: all entries encoded, against those that are found by kept keys.

The networks, queries and particles of `experiments/mnist_recall.py`, on random images: what an update costs does
not depend on them. All kinds take turns; peak memory is that of a process of its own for each. What it costs to
make all keys anew is told beside.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from figures import BenchmarkConfig, write
from machine import peak_memory

from common.timing import Spread, milliseconds, ratio, take_turns
from vma_pyro import Guide, MLPNetworks, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.data import RecallSampler
from vma_pyro.infer import make
from vma_pyro.memory.nearest import nearest
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training.loss import Loss


@dataclass(frozen=True)
class TrainingMemoryConfig(BenchmarkConfig):
    """Time updates under memories that are encoded whole, and under larger ones that are not."""

    whole: tuple[int, ...] = (256, 512)
    """|M| of updates that encode all of it."""
    found: tuple[int, ...] = (4096, 10_000, 60_000)
    """|M| of updates that encode `candidates`."""
    candidates: int = 512
    """Entries that these encode."""
    queries: int = 128
    """Images per update."""
    particles: int = 4
    """K of the multi-sample bound."""
    refresh_every: int = 500
    """Updates between two times that all keys are made anew."""
    repetitions: int = 30
    """Updates of each kind."""


def images(size: int) -> np.ndarray:
    """Binary noise with a fifth of ink, bytes [size, 28, 28]."""
    return (np.random.default_rng(0).random((size, 28, 28), np.float32) < 0.2).astype(np.uint8)


def build_update(config: TrainingMemoryConfig, size: int, by_keys: bool) -> Callable[[], None]:
    """One parameter update per call, of memories of `size` entries."""
    torch.manual_seed(0)
    networks = MLPNetworks(32, copies=True)
    every = config.refresh_every if by_keys else None
    guide: Guide = Guide(networks)
    if by_keys:
        guide = RetrievalGuide(networks, candidates=config.candidates, least=config.particles)
    # As in training, a small memory is drawn from many images; of all images it is always the same one.
    bank = images(size if config.tiny else max(size, 20_000))
    sampler = RecallSampler(bank, size=size, queries=config.queries, seed=0, refresh_every=every)
    loss = Loss(make("vimco", config.particles)(Model(networks), guide))
    optimizer = torch.optim.Adam(loss.loss_fn.parameters(), 1e-4, fused=True)

    def update() -> None:
        episode = sampler.sample()
        loss.gradient(episode.memory, episode.x)
        optimizer.step()
        if sampler.bank is not None:
            sampler.bank.refreshed = sampler.bank.updates  # refreshes are timed apart

    return update


def run_some(config: TrainingMemoryConfig, size: int, by_keys: bool) -> None:
    """A few updates, for their memory."""
    update = build_update(config, size, by_keys)
    for _ in range(3):
        update()


def parts_of_search(config: TrainingMemoryConfig) -> dict[str, Any]:
    """Milliseconds of the search in the largest memory with both types of keys, and of making all keys anew."""
    size = max(config.found)
    networks = MLPNetworks(32, copies=True)
    guide = RetrievalGuide(networks)
    sampler = RecallSampler(images(size), size=size, queries=config.queries, seed=0, refresh_every=1)
    assert sampler.bank is not None
    start = time.perf_counter()
    keys, centre = sampler.bank.keys_by(networks, guide.similarity)
    anew = 1e3 * (time.perf_counter() - start)
    with torch.no_grad():
        query = guide.similarity.embed(networks.query(sampler.sample().x).key, centre)  # type: ignore[operator]
    each = max(config.particles, config.candidates // config.queries)
    turns = {
        str(dtype).removeprefix("torch."): partial(nearest, query, keys.to(dtype), each)
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds = take_turns(turns, repetitions=config.repetitions, label="search")
    return {"memory": size, "refresh": anew, "search": {name: milliseconds(seconds[name]) for name in turns}}


def main(config: TrainingMemoryConfig) -> None:
    """Measure and write."""
    if config.tiny:
        sizes: dict[str, Any] = {"whole": (8,), "found": (40,), "candidates": 12, "queries": 3}
        config = replace(config, **sizes, particles=2, repetitions=2)
    kinds = [(size, False) for size in config.whole] + [(size, True) for size in config.found]
    turns = {f"{size} {by_keys}": build_update(config, size, by_keys) for size, by_keys in kinds}
    seconds = take_turns(turns, repetitions=config.repetitions, label="updates")
    first = seconds[next(iter(turns))]
    rows: list[dict[str, Any]] = [
        {
            "memory": size,
            "encoded": config.candidates if by_keys else size,
            "milliseconds": milliseconds(own),
            "ratio": ratio(own, first)._asdict(),
            "peak_gib": peak_memory(run_some, config, size, by_keys, here=config.tiny),
        }
        for (size, by_keys), own in zip(kinds, seconds.values(), strict=True)
    ]
    search = parts_of_search(config)
    content = {"updates": rows, "parts": search}
    write(
        config.output,
        "training_memory",
        "The price of a memory of thousands in training",
        content,
        page(config, rows, search),
        device=torch.device("cpu"),
    )


def page(config: TrainingMemoryConfig, rows: list[dict[str, Any]], search: dict[str, Any]) -> list[str]:
    """What the figures say."""
    lines = [
        [
            f"{row['memory']:,}",
            row["encoded"],
            Spread.read(row["milliseconds"]),
            Spread.read(row["ratio"]),
            f"{row['peak_gib']:.2f}",
        ]
        for row in rows
    ]
    each = search["refresh"] / config.refresh_every
    kinds = [[name, Spread.read(found)] for name, found in search["search"].items()]
    return [
        f"K = {config.particles}, {config.queries} images, VIMCO, run by Pyro without capture; medians, quartiles "
        "in brackets.",
        table(["M", "entries encoded", "ms per update", f"over M = {rows[0]['memory']}", "peak, GiB"], lines),
        f"All keys of {search['memory']:,} entries are made anew in {search['refresh']:.0f} ms, {each:.1f} ms per "
        f"update if that is every {config.refresh_every} updates; not in the table. The search of all images of "
        "an update among these, by the type of the keys:",
        table(["keys", "ms"], kinds),
    ]


if __name__ == "__main__":
    cli.run(main, TrainingMemoryConfig, __doc__)
