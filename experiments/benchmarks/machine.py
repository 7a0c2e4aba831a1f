"""The machine that a benchmark runs on: what it is, how fast it can be, and how much of its memory is taken."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # for `common`, which benchmarks share with the experiments

from common.peak import peak_so_far
from common.timing import take_turns
from vma_pyro import cli

T = TypeVar("T")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions of what runs on it."""
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), **versions}


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


def peak_memory(function: Callable[..., object], *arguments: Any, here: bool = False) -> float:
    """GiB of resident memory that a process of its own needs at most to run a function of a module.

    Args:
        function, arguments: what is run.
        here: in this process instead, whose memory holds more: quickly, to see that it works.
    """
    return _peak_after(function, arguments) if here else in_own_process(_peak_after, function, arguments)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a process of its own, whose memory holds nothing else."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(function, *arguments).result()


def _peak_after(function: Callable[..., object], arguments: Sequence[Any]) -> float:
    cli.set_up()
    function(*arguments)
    return peak_so_far()
