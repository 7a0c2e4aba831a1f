"""Episodes of one memory that holds its own targets, each of which is left out for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.data.episodes import Augmentation, Episode, as_images, augmented
from vma_pyro.data.records import Characters
from vma_pyro.data.workers import Stream, check_no_worker
from vma_pyro.memory import BankMemory, KeyedBank


class LeaveOneOutSampler(Stream):
    """Draws memories of whole classes without end, reproducibly; each target is an entry, but none for itself.

    All images of the data set are a bank; a memory is of some examples of some of its classes, up to all of both.
    A memory of thousands has no room for targets that are not in it, and with a target left out it need not.

    Args:
        dataset: characters [classes, examples, 28, 28].
        classes: classes per memory.
        shots: examples of each class in the memory, of which a target has one less.
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
        dataset: Characters,
        *,
        classes: int,
        shots: int,
        queries: int,
        seed: int,
        refresh_every: int = 500,
        augment: Augmentation | None = None,
    ) -> None:
        images = torch.from_numpy(augmented(dataset.images, augment))
        available, examples = images.shape[:2]
        for name, value in (("classes", classes), ("shots", shots), ("queries", queries)):
            check_whole(name, value, least=0)
        if not 1 <= classes <= available:
            raise ValueError(f"classes: expected 1 to {available}, the classes of the data set, got {classes}")
        if not 2 <= shots <= examples:
            raise ValueError(
                f"shots: expected 2 to {examples}, the examples of a class, of which one may be left out, got "
                f"{shots}"
            )
        if not 1 <= queries <= classes * shots:
            raise ValueError(f"queries: expected 1 to {classes * shots}, the entries of the memory, got {queries}")
        super().__init__(seed)
        self.images, self.classes, self.shots, self.queries = images, classes, shots, queries
        self._labels = torch.arange(available).repeat_interleave(examples)
        self.bank = KeyedBank(images.flatten(0, 1).unsqueeze(-3), self._labels, refresh_every=refresh_every)

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
        available, examples = self.images.shape[:2]
        chosen = torch.randperm(available, generator=self._generator)[: self.classes]
        order = torch.rand(self.classes, examples, generator=self._generator).argsort(1)[:, : self.shots]
        rows = (chosen[:, None] * examples + order).flatten()
        return rows, torch.randperm(len(rows), generator=self._generator)[: self.queries]

    def _episode(self, rows: Tensor, address: Tensor) -> Episode:
        check_no_worker("a bank with keys")
        x = as_images(self.images.flatten(0, 1)[rows[address]])
        return Episode(BankMemory(self.bank, rows, left_out=address), x, self._labels[rows[address]])
