"""Hard against soft attention: the cost of one update for growing memories.

Hard: one entry is read per particle. Soft: every read is a weighted mean of the features of all entries. Same
networks, same number of particles, same entries; both encode each entry once per update.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from figures import BenchmarkConfig, write
from matplotlib.figure import Figure
from torch import nn
from update import captured, episodes, updates

from common import plots
from common.results import Picture
from common.timing import Spread, milliseconds, ratio, take_turns
from vma_pyro import ConvNetworks, Guide, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.comparisons import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import Episode
from vma_pyro.infer import MultiSampleELBO, fit_slope
from vma_pyro.training import device_of_name
from vma_pyro.training.loss import Loss

K = 4  # particles


@dataclass(frozen=True)
class AttentionConfig(BenchmarkConfig):
    """Time one update with hard and with soft attention."""

    memories: tuple[int, ...] = (8, 16, 32, 48, 64, 128, 256, 512)
    """|M|, multiples of 4."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps."""
    queries: int = 32
    """Images per update."""
    repetitions: int = 30
    """Updates of each."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def build_update(kind: str, config: AttentionConfig, rounds: list[Episode]) -> Callable[[], None]:
    """One parameter update per call."""
    torch.manual_seed(0)
    networks = ConvNetworks(width=config.width).to(rounds[0].x.device)
    model: nn.Module = Model(networks) if kind == "hard" else SoftAttentionModel(networks)
    guided = kind == "soft, target-guided"
    guide: nn.Module = Guide(networks) if kind == "hard" else SoftAttentionGuide(networks, target_guided=guided)
    device = rounds[0].x.device
    loss_fn = MultiSampleELBO(K, max_plate_nesting=1)(model, guide).to(device)
    recorded = device.type == "cpu" and not config.tiny  # to record six takes longer than the rest
    return updates(captured(loss_fn) if recorded else Loss(loss_fn), rounds)


KINDS = ("hard", "soft", "soft, target-guided")


def measure(config: AttentionConfig) -> list[dict[str, Any]]:
    """Seconds of each at each |M|, and soft over hard."""
    device = device_of_name(config.accelerator)
    rounds = {size: episodes(size, config.queries, device) for size in config.memories}
    turns = {
        f"{kind} {size}": build_update(kind, config, rounds[size]) for kind in KINDS for size in config.memories
    }
    seconds = take_turns(turns, repetitions=config.repetitions, device=device, label="all sizes")
    rows = []
    for size in config.memories:
        hard, soft, guided = (seconds[f"{kind} {size}"] for kind in KINDS)
        rows.append(
            {
                "memory": size,
                "milliseconds": {kind: milliseconds(seconds[f"{kind} {size}"]) for kind in KINDS},
                "soft_over_hard": ratio(soft, hard)._asdict(),
                "guided_over_hard": ratio(guided, hard)._asdict(),
            }
        )
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Milliseconds and the ratio against |M|."""
    sizes = [row["memory"] for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in KINDS:
        left.plot(sizes, [row["milliseconds"][kind]["median"] for row in rows], marker="o", label=kind)
    left.set(xscale="log", yscale="log", xlabel="|M|", ylabel="ms per update")
    left.legend()
    right.plot(sizes, [row["soft_over_hard"]["median"] for row in rows], marker="o")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xscale="log", xlabel="|M|", ylabel="soft over hard")
    plots.save(figure, path, dpi=120)


def main(config: AttentionConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, memories=(8, 16), width=0.1, queries=4, repetitions=2)
    rows = measure(config)
    slope = fit_slope(config.memories, [row["milliseconds"]["hard"]["median"] for row in rows])
    head = ["|M|", *(f"{kind}, ms" for kind in KINDS), "soft over hard", "target-guided over hard"]
    lines = [
        [row["memory"], *(Spread.read(row["milliseconds"][kind]) for kind in KINDS)]
        + [Spread.read(row[name]) for name in ("soft_over_hard", "guided_over_hard")]
        for row in rows
    ]
    parts: list[str | Picture] = [
        f"Width {config.width:g}, K = {K}, {config.queries} images per update, one memory for all; medians, "
        "quartiles in brackets; all take turns.",
        table(head, lines),
        f"The cost of an update with hard attention grows as |M| to the power {slope:.2f}, fitted over all sizes.",
        Picture(
            "attention.png",
            "Milliseconds per update against the size of the memory",
            lambda path: draw(path, rows),
        ),
    ]
    content = {"hard_exponent": slope, "rows": rows}
    device = device_of_name(config.accelerator)
    write(config.output, "attention", "Hard against soft attention", content, parts, device=device)


if __name__ == "__main__":
    cli.run(main, AttentionConfig, __doc__)
