"""Several processes that hold one thing together: the few collective operations that this takes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Joins the processes of `torch.distributed`, or stands for this one alone.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def start(cls) -> Ranks:
        """Meet the other processes that `torchrun` has started; this one alone without it."""
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        if "TORCHELASTIC_RUN_ID" in os.environ and not started:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # The first process may evaluate for hours while the others wait; torchrun notices one that has died.
            torch.distributed.init_process_group(backend, timeout=timedelta(days=2))
            atexit.register(torch.distributed.destroy_process_group)
        return cls.present()

    @classmethod
    def present(cls) -> Ranks:
        """Find the processes that torch.distributed has been started with; this one alone if it has not."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def sum(self, value: Tensor) -> Tensor:
        """Add up the values of all processes; each gets the result."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        """Gather the values of all processes, which must have one shape, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [torch.empty_like(value) for _ in range(self.size)]
        torch.distributed.all_gather(values, value.contiguous())
        return values

    def log_sum(self, value: Tensor) -> Tensor:
        """Add up what the processes hold, given the logarithms of their sums."""
        return torch.stack(self.gather(value)).logsumexp(0)

    def first(self, value: Tensor) -> Tensor:
        """Send the value of process 0 to all."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.broadcast(value, 0)
        return value

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call a function in the first process, then in the others: the first may make files that all read."""
        if self.rank > 0:
            self.wait()
            return function()
        result = function()
        self.wait()
        return result

    def wait(self) -> None:
        """Wait until all are here."""
        self.sum(torch.zeros(()))
