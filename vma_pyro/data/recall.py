"""Episodes of recall: every target is itself an entry of the memory (Bornschein et al. 2017, section 4.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.data.episodes import Episode, as_images
from vma_pyro.data.image_checks import check_binary, look_at_ink
from vma_pyro.data.workers import Stream, check_no_worker
from vma_pyro.memory import BankMemory, KeyedBank, Memory


class RecallSampler(Stream):
    """Draws memories of distinct images without end, reproducibly, with some of their own entries as targets.

    The label of an entry is its address; the label of a target is the address that it is to be found at. (Of
    a bank they are rows of `images`.)

    Args:
        images: uint8 {0, 1} [N, 28, 28].
        size: |M|, entries drawn afresh for each episode without replacement.
        queries: B, targets of each episode, drawn from the entries without replacement.
        seed: of the stream.
        refresh_every: None: an update encodes all entries. A number of updates: the images are a `KeyedBank`,
            whose keys are made anew so often, and the memory is of it, as `RetrievalGuide` takes it; of all images
            together it is the same one every time. The keys go with the position in the stream.

    Raises:
        ValueError: more entries than images, more targets than entries, images of another type or shape.
    """

    def __init__(
        self, images: np.ndarray, *, size: int, queries: int, seed: int, refresh_every: int | None = None
    ) -> None:
        check_binary("images", images, ndim=3)
        check_whole("size", size, least=0)
        check_whole("queries", queries, least=0)
        if not 1 <= size <= len(images):
            raise ValueError(f"size: expected 1 to {len(images)}, the number of images, got {size}")
        if not 1 <= queries <= size:
            raise ValueError(f"queries: expected 1 to {size}, the entries of the memory, got {queries}")
        look_at_ink("images", images)
        super().__init__(seed)
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.size, self.queries = size, queries
        self.bank: KeyedBank | None = None
        if refresh_every is not None:
            entries, rows = self.images.unsqueeze(-3), torch.arange(len(images))
            self.bank = KeyedBank(entries, rows, refresh_every=refresh_every)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the bank's keys."""
        return super().state_dict() | ({} if self.bank is None else {"bank": self.bank.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: that of a stream with a bank, where this one has none, or the other way round.
        """
        if ("bank" in state) != (self.bank is not None):
            here, there = ("keys of a bank" if yes else "none" for yes in (self.bank is not None, "bank" in state))
            raise ValueError(f"refresh_every: expected a saved position with {here} as here, got {there}")
        super().load_state_dict(state)
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Draw the images of the memory [S] and the addresses of the targets [b]."""
        if self.bank is not None and self.size == len(self.images):  # their order does not matter
            return torch.arange(self.size), torch.randperm(self.size, generator=self._generator)[: self.queries]
        chosen = torch.randperm(len(self.images), generator=self._generator)[: self.size]
        return chosen, torch.randperm(self.size, generator=self._generator)[: self.queries]

    def _episode(self, chosen: Tensor, address: Tensor) -> Episode:
        if self.bank is not None:
            check_no_worker("a bank with keys")
            memory = BankMemory(self.bank, None if self.size == len(self.images) else chosen)
            return Episode(memory, as_images(self.images[chosen[address]]), chosen[address])
        entries = as_images(self.images[chosen])
        return Episode(Memory(entries, torch.arange(self.size)), entries[address], address)
