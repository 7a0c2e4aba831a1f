"""Interleaved timing: contenders take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page import set_up
from torch import nn
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
        """Of one number per repetition."""
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(quartiles).tolist()
        return cls(median, low, high, len(values))

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
            wait(device)
            before = time.perf_counter()
            contenders[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - before)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was told; nothing on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, *, size: int = 2048, repetitions: int = 20) -> dict[str, float]:
    """Floating-point operations per second at best: of a product of square matrices, and of a 3x3 convolution.

    Libraries differ: on some CPUs a convolution runs at twice the rate of a matrix product.
    """
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    maps = torch.randn(64, size // 16, 28, 28, device=device).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(maps.shape[1], maps.shape[1], 3, padding=1).to(device).to(memory_format=torch.channels_last)
    turns = {"matrix product": lambda: a @ b, "convolution": lambda: layer(maps)}
    with torch.no_grad():
        seconds = take_turns(turns, repetitions=repetitions, warm_up=2, device=device, label="rates")
    operations = {"matrix product": 2 * size**3, "convolution": 2 * 9 * maps.shape[1] * maps.numel()}
    return {name: operations[name] / min(seconds[name]) for name in turns}


def peak_memory(function: Callable[..., object], *arguments: Any) -> float:
    """GiB of resident memory that a process of its own needs at most to run a function of a module."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_peak_of, function, arguments).result()


def _peak_of(function: Callable[..., object], arguments: Sequence[Any]) -> float:
    set_up()
    function(*arguments)
    return peak_so_far()


def peak_so_far() -> float:
    """GiB of resident memory that this process has needed at most."""
    # Linux hands the peak that `resource` tells down from the parent; this one is the process's own.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
