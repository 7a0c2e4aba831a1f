"""Milliseconds per update of every estimator, on the memory model."""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from figures import BenchmarkConfig, write
from update import episodes, updates

from common.timing import Spread, milliseconds, ratio, take_turns
from vma_pyro import ConvNetworks, Guide, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.data import Episode
from vma_pyro.infer import BINARY, ESTIMATORS, make
from vma_pyro.infer.comparison.compare import evaluations_of
from vma_pyro.training import device_of_name
from vma_pyro.training.loss import Loss

JUDGE = "vimco"
# Bits have no place in an address, and values cannot be kept for datapoints that an episode draws anew.
LEFT_OUT = BINARY | {"jsa"}
FITTING = tuple(name for name in ESTIMATORS if name not in LEFT_OUT)
A_FEW = ("rloo", "distinct", "measure-valued")
ONE_DRAW = {"measure-valued", "measure-valued+common"}  # which takes all values of the address already


@dataclass(frozen=True)
class EstimatorsConfig(BenchmarkConfig):
    """Time one update of each estimator."""

    width: float = 0.33
    """Factor on the paper's 48 and 64 maps."""
    particles: int = 4
    """K."""
    queries: int = 32
    """Images per update."""
    repetitions: int = 20
    """Updates of each."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    estimators: tuple[str, ...] = ()
    """Names, beside VIMCO; default: all that fit an address. With `tiny` three."""

    def __post_init__(self) -> None:
        """Refuse names that are none, or do not fit an address."""
        for name in self.estimators:
            if name not in FITTING:
                raise ValueError(f"estimators: expected names among {', '.join(FITTING)}, got {name!r}")

    def names(self) -> list[str]:
        """List the estimators that take turns."""
        chosen = self.estimators or (A_FEW if self.tiny else FITTING)
        return list(dict.fromkeys((JUDGE, *chosen)))


def build_update(name: str, config: EstimatorsConfig, rounds: list[Episode]) -> tuple[Callable[[], None], float]:
    """One parameter update per call, and the runs of the model per image that it takes."""
    device = rounds[0].x.device
    torch.manual_seed(0)
    networks = ConvNetworks(width=config.width).to(device)
    model, guide = Model(networks), Guide(networks).to(device)
    number = 1 if name in ONE_DRAW else config.particles
    cost = evaluations_of(make(name, number), model, guide, (rounds[0].memory, rounds[0].x))
    return updates(Loss(make(name, number)(model, guide).to(device)), rounds), cost


def main(config: EstimatorsConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, width=0.1, queries=2, repetitions=1)
    device = device_of_name(config.accelerator)
    rounds = episodes(32, config.queries, device)
    made = {name: build_update(name, config, rounds) for name in config.names()}
    turns = {name: update for name, (update, _) in made.items()}
    seconds = take_turns(turns, repetitions=config.repetitions, warm_up=2, device=device, label="estimators")
    rows: list[dict[str, Any]] = [
        {
            "estimator": name,
            "evaluations": cost,
            "milliseconds": milliseconds(seconds[name]),
            "over_vimco": ratio(seconds[name], seconds[JUDGE])._asdict(),
        }
        for name, (_, cost) in made.items()
    ]
    rows.sort(key=lambda row: row["milliseconds"]["median"])
    lines = [
        [row["estimator"], f"{row['evaluations']:.3g}"]
        + [Spread.read(row[name]) for name in ("milliseconds", "over_vimco")]
        for row in rows
    ]
    parts = [
        f"Width {config.width:g}, K = {config.particles} (or the least that the estimator takes), |M| = 32, "
        f"{config.queries} images per update; medians, quartiles in brackets; all take turns. A run of the model "
        "without a graph counts as a third of one.",
        table(["estimator", "runs of the model per image", "ms per update", "over VIMCO's"], lines),
    ]
    content = {"width": config.width, "particles": config.particles, "rows": rows}
    write(config.output, "estimators", "An update of each estimator", content, parts, device=device)


if __name__ == "__main__":
    cli.run(main, EstimatorsConfig, __doc__)
