"""The price of |M|: one training update under a shared memory, and addressing up to a million entries.

Training: every entry is encoded once per update. Addressing: all entries are encoded once, then a query is
compared with every key. Large memories are glyphs and copies of them moved by up to two pixels.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from figures import BenchmarkConfig, write
from machine import peak_so_far
from matplotlib.figure import Figure
from update import captured, episodes, updates

from common import plots
from common.results import Picture
from common.timing import Spread, milliseconds, take_turns
from vma_pyro import AddressIndex, ConvNetworks, Guide, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.data import glyphs
from vma_pyro.evaluation import large_log_likelihood, sample_images
from vma_pyro.infer import MultiSampleELBO, fit_slope

FIXED = 32  # |M| at which a query costs what does not depend on |M|


@dataclass(frozen=True)
class MemoryConfig(BenchmarkConfig):
    """Time updates and queries for growing memories."""

    trained: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """|M| of the updates, multiples of 4."""
    addressed: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000)
    """|M| of the queries, besides `FIXED`."""
    key_dtype: tuple[str, ...] = ("float32", "bfloat16")
    """How keys are kept."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps."""
    queries: int = 32
    """Images per update, and per batch of queries."""
    repetitions: int = 30
    """Updates of each size, and queries of each kind."""


def programs(config: MemoryConfig) -> tuple[Model, Guide]:
    """Model and guide with initial weights, whose cost is that of trained ones."""
    torch.manual_seed(0)
    networks = ConvNetworks(width=config.width)
    return Model(networks), Guide(networks)


def build_update(config: MemoryConfig, size: int) -> Callable[[], None]:
    """One parameter update per call, under |M| = size."""
    loss_fn = MultiSampleELBO(4, max_plate_nesting=1)(*programs(config))
    return updates(captured(loss_fn), episodes(size, config.queries, torch.device("cpu")))


def jittered(size: int) -> torch.Tensor:
    """Glyphs and copies of them, moved by up to two pixels either way: bytes [size, 1, 28, 28]."""
    originals = torch.from_numpy(glyphs.load(classes=min(2000, -(-size // 20))).images).reshape(-1, 28, 28)
    moved = [originals]
    moves = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if (dy, dx) != (0, 0)]
    while sum(map(len, moved)) < size:
        moved.append(originals.roll(moves[len(moved) - 1], dims=(1, 2)))
    return torch.cat(moved)[:size].unsqueeze(1)


def addressing(config: MemoryConfig) -> list[dict[str, Any]]:
    """Seconds to encode, and milliseconds of each kind of query, by size and type of keys."""
    model, guide = programs(config)
    entries = jittered(max(config.addressed))
    characters = glyphs.load(classes=20, seed=1)
    x = torch.from_numpy(characters.images).flatten(0, 1)[: config.queries, None].float()
    rows = []
    for dtype in config.key_dtype:
        start = time.perf_counter()
        whole = AddressIndex.encode(model, guide, entries, key_dtype=getattr(torch, dtype), show_progress=True)
        encoding = (time.perf_counter() - start) / len(entries)
        for size in (FIXED, *config.addressed):
            # Keys of the whole, cut to size: what a query costs does not depend on their values.
            kept = whole.kept
            cut = {name: getattr(kept, name)[:size] for name in ("entries", "keys", "prior")}
            index = AddressIndex(model, guide, replace(kept, **cut))
            rows.append(
                {"keys": dtype, "memory": size, "encoding_seconds": encoding * size} | asked(index, x, config)
            )
    return rows


def asked(index: AddressIndex, x: torch.Tensor, config: MemoryConfig) -> dict[str, Any]:
    """Milliseconds of each kind of query."""
    k = min(32, index.size)
    turns: dict[str, Callable[[], object]] = {
        "posterior of one query": lambda: index.posterior(x[:1]),
        "top 32 of one query": lambda: index.top(x[:1], k),
        f"top 32 of {len(x)} queries": lambda: index.top(x, k),
        "32 samples of one query": lambda: index.sample(x[:1], 32),
        "bound of one image, top 32, 10 samples": lambda: large_log_likelihood(
            index, x[:1], num_samples=10, top=k
        ),
        "8 new images": lambda: sample_images(index, 8),
    }
    seconds = take_turns(turns, repetitions=config.repetitions, label=f"|M| = {index.size}")
    return {
        "milliseconds": {name: milliseconds(seconds[name]) for name in turns},
        "peak_gib_so_far": peak_so_far(),
    }


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Exponent of |M| in the cost of a query beyond its fixed part, by keys and query; None if that is noise."""
    found: dict[str, dict[str, float | None]] = {}
    for dtype in dict.fromkeys(row["keys"] for row in rows):
        fixed, *own = (row for row in rows if row["keys"] == dtype)
        found[dtype] = {}
        for name, least in fixed["milliseconds"].items():
            beyond = [row["milliseconds"][name]["median"] - least["median"] for row in own]
            found[dtype][name] = fit_slope([r["memory"] for r in own], beyond) if min(beyond) > 0 else None
    return found


def draw(path: Path, training: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Cost against |M|."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["memory"] for row in training]
    times = [row["milliseconds"]["median"] for row in training]
    left.plot(sizes, times, marker="o", label="measured")
    left.plot(
        sizes, [times[0] * s / sizes[0] for s in sizes], color="grey", linestyle=":", label="in proportion to |M|"
    )
    left.set(xscale="log", yscale="log", xlabel="|M|", ylabel="ms per update", title="training")
    left.legend()
    for dtype in dict.fromkeys(row["keys"] for row in rows):
        own = [row for row in rows if row["keys"] == dtype and row["memory"] > FIXED]
        for name in list(own[0]["milliseconds"])[:3]:
            times = [row["milliseconds"][name]["median"] for row in own]
            style = "-" if dtype == "float32" else "--"
            right.plot([row["memory"] for row in own], times, style, marker="o", label=f"{name}, {dtype}")
    right.set(xscale="log", yscale="log", xlabel="|M|", ylabel="ms", title="addressing")
    right.legend(fontsize=7)
    plots.save(figure, path, dpi=120)


def main(config: MemoryConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, trained=(8, 16), addressed=(40, 80), width=0.1, queries=2, repetitions=2)
    turns = {str(size): build_update(config, size) for size in config.trained}
    seconds = take_turns(turns, repetitions=config.repetitions, label="training")
    training: list[dict[str, Any]] = [
        {"memory": size, "milliseconds": milliseconds(seconds[str(size)])} for size in config.trained
    ]
    slope = fit_slope(config.trained, [row["milliseconds"]["median"] for row in training])
    rows = addressing(config)
    slopes = exponents(rows)
    content = {
        "training": training,
        "training_exponent": slope,
        "addressing": rows,
        "addressing_exponents": slopes,
    }
    parts = page(config, training, slope, rows, slopes)
    write(config.output, "memory", "The price of memory", content, parts, device=torch.device("cpu"))


def page(
    config: MemoryConfig,
    training: list[dict[str, Any]],
    slope: float,
    rows: list[dict[str, Any]],
    slopes: dict[str, dict[str, float | None]],
) -> list[str | Picture]:
    """What the figures say."""
    names = list(rows[0]["milliseconds"])
    updates = [[row["memory"], Spread.read(row["milliseconds"])] for row in training]
    queries = [
        [row["keys"], f"{row['memory']:,}", f"{row['encoding_seconds']:.1f}"]
        + [Spread.read(row["milliseconds"][name]) for name in names]
        + [f"{row['peak_gib_so_far']:.2f}"]
        for row in rows
    ]
    fitted = [
        [dtype, *("none to see" if (s := own[name]) is None else f"{s:.2f}" for name in names)]
        for dtype, own in slopes.items()
    ]
    return [
        f"Width {config.width:g}; medians, quartiles in brackets.",
        "## One update, one memory for all images",
        f"K = 4, {config.queries} images, VIMCO; all sizes take turns.",
        table(["|M|", "ms per update"], updates),
        f"The cost grows as |M| to the power {slope:.2f} (fitted over all sizes).",
        "## Addressing",
        f"Milliseconds once encoded. At |M| = {FIXED} they are what a query costs besides comparing it with the "
        "entries: its embedding by the networks, and what happens in the small memory of the entries found. Peak "
        "memory is that of the process up to there, in GiB.",
        table(["keys", "|M|", "encoding, s (in proportion)", *names, "peak"], queries),
        table([f"exponent of |M|, beyond the cost at {FIXED}", *names], fitted),
        Picture("memory.png", "Cost against the size of the memory", lambda path: draw(path, training, rows)),
    ]


if __name__ == "__main__":
    cli.run(main, MemoryConfig, __doc__)
