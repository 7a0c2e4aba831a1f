"""Updates whose networks are translated by `torch.compile`, where that has been seen to be faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vma_pyro.memory import Memory
from vma_pyro.training.config import TrainConfig
from vma_pyro.training.loss import Loss

BACKEND = "inductor"
FUNCTIONS = ("encode", "heads", "query", "decode")  # of networks, from tensors to tensors; Pyro sees none of them
PAYS_FROM = 20.0  # minutes of training: translating takes about one
FEW = 100  # updates, which are not even timed: one of 12 seconds would have to be among them
ROUNDS = 5
FASTER = 0.95  # share of the time without, from which on it is used: near 1 the clock would decide by chance


class Compiled(Loss):
    """A loss, with the functions of the networks of its programs translated while it runs, and only then.

    Shapes are static. Nothing is left on the networks: copies, files and evaluations have them as they are.

    Args:
        loss: how the gradient is computed.
        backend: that of `torch.compile`; `BACKEND` by default.
    """

    def __init__(self, loss: Loss, *, backend: str | None = None) -> None:
        super().__init__(loss.loss_fn, note=loss.note, autocast=loss.autocast)
        self.loss = loss
        self.functions: dict[tuple[nn.Module, str], Callable[..., Any]] = {
            (networks, name): torch.compile(getattr(networks, name), dynamic=False, backend=backend or BACKEND)
            for networks in networks_of(loss.loss_fn)
            for name in FUNCTIONS
            if hasattr(networks, name)
        }

    def gradient(self, memory: Memory, x: Tensor) -> Tensor:
        """As `Loss.gradient`; without the translation, and a line that says so, where there can be none."""
        if self.functions:
            noise = torch.get_rng_state()
            try:
                with self.in_place():
                    return self.loss.gradient(memory, x)
            except Exception as error:  # a compiler's, or the program's own: then it is raised again below
                self.functions.clear()
                self.reason = (str(error) or type(error).__name__).splitlines()[0]
                torch.set_rng_state(noise)
            found = self.loss.gradient(memory, x)
            self.note(f"compile: not used, {self.reason}")
            return found
        return self.loss.gradient(memory, x)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the translated functions before those of the class."""
        own = {
            (networks, name): vars(networks)[name] for networks, name in self.functions if name in vars(networks)
        }
        for (networks, name), function in self.functions.items():
            vars(networks)[name] = function
        try:
            yield
        finally:
            for networks, name in self.functions:
                del vars(networks)[name]
            for (networks, name), function in own.items():
                vars(networks)[name] = function


def networks_of(loss_fn: nn.Module) -> list[nn.Module]:
    """The networks of the programs, each once."""
    found = (getattr(program, "networks", None) for program in loss_fn.modules())
    return list(dict.fromkeys(networks for networks in found if isinstance(networks, nn.Module)))


def faster(compiled: Compiled, other: Loss, memory: Memory, x: Tensor) -> bool:
    """Compare the time of an update with that of another way to make it, in turns; say what was found in a line.

    Neither parameters nor noise are changed; gradients are.
    """
    took: dict[Loss, list[float]] = {compiled: [], other: []}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for _ in range(2 + ROUNDS):  # of which the first translate and record
            for loss, seconds in took.items():
                seconds.append(seconds_of(loss, memory, x))
    ratio = statistics.median(took[compiled][2:]) / statistics.median(took[other][2:])
    used = bool(compiled.functions) and ratio < FASTER
    if compiled.functions:
        compiled.note(f"compile: {'used' if used else 'not used'}, {ratio:.2f} of the time of an update without")
    return used


def seconds_of(loss: Loss, memory: Memory, x: Tensor) -> float:
    """Time one gradient."""
    start = time.perf_counter()
    loss.gradient(memory, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def is_long(config: TrainConfig, loss: Loss, memory: Memory, x: Tensor) -> bool:
    """Whether a run is long enough for a translation to pay for itself."""
    minutes = math.inf if config.minutes is None else config.minutes
    if minutes < PAYS_FROM or (config.updates is not None and config.updates <= FEW):
        return False
    if config.updates is not None:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            seconds = min(seconds_of(loss, memory, x) for _ in range(2))
        minutes = min(minutes, config.updates * seconds / 60)
    return minutes >= PAYS_FROM
