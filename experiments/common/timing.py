"""Interleaved timing: contenders take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements.

    Attributes:
        median, low, high: 50 %, 25 % and 75 %.
        n: measurements.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up one number per repetition."""
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(quartiles).tolist()
        return cls(median, low, high, len(values))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Spread:
        """Read it from JSON."""
        return cls(**content)

    def __str__(self) -> str:
        """Median, and the quartiles behind it."""
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    warm_up: int = 3,
    device: torch.device | None = None,
    label: str = "",
) -> dict[str, list[float]]:
    """Seconds per call, for each contender and repetition.

    Args:
        contenders: what to call, by name.
        repetitions: rounds; in each, every contender is called once, in a random order.
        warm_up: calls of each before the first round.
        device: a GPU is waited for.
        label: of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:
        for _ in range(warm_up):
            contenders[name]()
    order = random.Random(0)
    for _ in tqdm(range(repetitions), desc=label, leave=False):
        # In random order, as what ran before leaves its traces in the caches.
        for name in order.sample(names, len(names)):
            _wait(device)
            before = time.perf_counter()
            contenders[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - before)
    return seconds


def _wait(device: torch.device | None) -> None:
    """Let a GPU finish what it was told to do; a CPU has already."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The spread in milliseconds, for JSON."""
    return Spread.of([1e3 * s for s in seconds])._asdict()
