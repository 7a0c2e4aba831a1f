"""Episodes of one memory that holds its own targets, each of which is left out for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.data.episodes import TURNS, Augmentation, Episode, augmented
from vma_pyro.data.ragged import Counted
from vma_pyro.data.records import ImageClasses
from vma_pyro.data.workers import Stream, check_no_worker
from vma_pyro.memory import BankMemory, KeyedBank


class LeaveOneOutSampler(Stream):
    """Draws memories of whole classes without end, reproducibly; each target is an entry, but none for itself.

    All images of the data set are a bank; a memory is of some examples of some of its classes, up to all of both.
    A memory of thousands has no room for targets that are not in it, and with a target left out it need not.

    Args:
        dataset: images with classes, of 2 examples or more.
        classes: classes per memory.
        shots: examples of each class in the memory (or all that it has), of which a target has one less.
        queries: B, targets of each episode, drawn from the entries without replacement.
        seed: of the stream.
        refresh_every: updates between two times that the bank's keys are made anew, see `KeyedBank`.
        augment: as of `EpisodeSampler`.

    Attributes:
        bank: of all images; its keys go with the position in the stream.

    Raises:
        ValueError: more classes or shots than the data set has, more targets than entries, a class of a single
            example.
    """

    def __init__(
        self,
        dataset: ImageClasses,
        *,
        classes: int,
        shots: int,
        queries: int,
        seed: int,
        refresh_every: int = 500,
        augment: Augmentation | None = None,
    ) -> None:
        pixels = augmented(dataset, augment)
        counted = Counted.of(torch.as_tensor(dataset.counts).repeat(TURNS[augment]))
        available, examples = len(counted.number), counted.most
        for name, value in (("classes", classes), ("shots", shots), ("queries", queries)):
            check_whole(name, value, least=0)
        if not 1 <= classes <= available:
            raise ValueError(f"classes: expected 1 to {available}, the classes of the data set, got {classes}")
        if not 2 <= shots <= examples:
            raise ValueError(
                f"shots: expected 2 to {examples}, the examples of a class, of which one may be left out, got "
                f"{shots}"
            )
        if counted.number.min() < 2:
            raise ValueError("dataset: expected classes of 2 examples or more, as one is left out, got one of 1")
        least = int(counted.number.clamp(max=shots).sort().values[:classes].sum())
        if not 1 <= queries <= least:
            raise ValueError(f"queries: expected 1 to {least}, the entries of the memory, got {queries}")
        super().__init__(seed)
        self.pixels, self.counted, self.as_float = pixels, counted, dataset.as_float
        self.classes, self.shots, self.queries = classes, shots, queries
        self._labels = torch.arange(available).repeat_interleave(counted.number)
        entries = dataset.as_float(pixels) if dataset.bits == 8 else pixels  # binary ones may stay bytes
        self.bank = KeyedBank(entries, self._labels, refresh_every=refresh_every)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the bank's keys."""
        return super().state_dict() | {"bank": self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: that of a stream without a bank.
        """
        if "bank" not in state:
            raise ValueError("episodes: expected a saved position with keys of a bank as here, got none")
        super().load_state_dict(state)
        self.bank.load_state_dict(state["bank"])

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Draw the rows of the memory [S], class by class, and the addresses of the targets [b]."""
        chosen = torch.randperm(len(self.counted.number), generator=self._generator)[: self.classes]
        noise = torch.rand(self.classes, self.counted.most, generator=self._generator)
        order = self.counted.orders(chosen, noise)[:, : self.shots]
        rows = self.counted.rows(chosen, order)[torch.arange(self.shots) < self.counted.number[chosen][:, None]]
        return rows, torch.randperm(len(rows), generator=self._generator)[: self.queries]

    def _episode(self, rows: Tensor, address: Tensor) -> Episode:
        check_no_worker("a bank with keys")
        x = self.as_float(self.pixels[rows[address]])
        return Episode(BankMemory(self.bank, rows, left_out=address), x, self._labels[rows[address]])
