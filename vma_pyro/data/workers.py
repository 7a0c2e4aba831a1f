"""Streams of episodes in the workers of a `DataLoader`: each has its own, and together they are the one stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

T = TypeVar("T")


class Stream(IterableDataset[Any]):
    """Draws episodes without end, reproducibly, from random numbers of its own.

    Of n workers, worker w takes episodes w, w + n, w + 2 n, ..., and draws only the random numbers of those
    between: `DataLoader(stream, batch_size=None, num_workers=n)` gives the same episodes in the same order for any
    n. So does one around a dataset of your own that iterates over a stream. The workers have copies of the stream,
    which itself stays where it is: go over a loader once, or make it with `persistent_workers=True`.

    Args:
        seed: of the stream.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._began = False  # in a worker

    @abstractmethod
    def _drawn(self) -> tuple[Any, ...]:
        """Draw everything random about the next episode from `_generator`."""

    @abstractmethod
    def _episode(self, *drawn: Any) -> Any:
        """Make the episode of what was drawn, without anything random."""

    def __iter__(self) -> Iterator[Any]:
        """Yield episodes without end; the stream goes on where the last iteration stopped."""
        while True:
            yield self.sample()

    def sample(self) -> Any:
        """Draw the next episode."""
        for _ in range(self._turns_of_others()):
            self._drawn()
        return self._episode(*self._drawn())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, as tensors only."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self._generator.set_state(state["generator"])

    def _turns_of_others(self) -> int:
        worker = get_worker_info()
        if worker is None:
            return 0
        began, self._began = self._began, True
        return worker.num_workers - 1 if began else worker.id

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the generator as bytes: torch's own way to a spawned process loses its state."""
        return self.__dict__ | {"_generator": self._generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the same stream at the same position."""
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8))


def check_no_worker(what: str) -> None:
    """Refuse to draw in a worker what training has to change in its own process."""
    if get_worker_info() is not None:
        raise ValueError(
            f"num_workers: expected 0 for {what}, which training changes in its own process, got workers"
        )


def take_turns(parts: Iterable[T]) -> Iterator[T]:
    """Take every n-th part in one of n workers of a `DataLoader`, all of them elsewhere."""
    worker = get_worker_info()
    return iter(parts) if worker is None else islice(parts, worker.id, None, worker.num_workers)
