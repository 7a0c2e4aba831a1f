"""Memories of their own for many images, all of entries of one bank, each of which is encoded once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vma_pyro.memory.memory import Encoder, Memory, map_tensors

ENTRIES_PER_CHUNK = 2048  # of the bank, encoded at a time


class SelectedMemory(Memory):
    """One memory per datapoint, of entries of a bank that all of them share.

    For evaluations, where a test image sits in thousands of memories: the bank is encoded whole, once, and what is
    read is looked up in it. Use it only while no parameter changes and no gradient is taken.

    Args:
        bank: a shared memory [N, *E] without a mask; see `bank_of`.
        rows: int64 [B, S], the entries of each datapoint's memory.
        labels: class of each entry, int64 [B, S].

    Attributes:
        features: of the entries selected, by name; gathered when asked for.
    """

    def __init__(self, bank: Memory, rows: Tensor, labels: Tensor | None = None) -> None:
        if bank.mask is not None:
            raise ValueError("bank: expected every row to be an entry, got a memory with padding (a mask)")
        if not bank.is_shared:
            raise ValueError(f"bank: expected one shared memory, got entries {list(bank.entries.shape)}")
        super().__init__(bank.entries[rows], labels, bank.event_dim)
        self.bank, self.rows = bank, rows
        self._whole: Memory | None = None  # the bank, encoded

    def to(self, device: torch.device | str) -> Memory:
        """The same memories on another device; a bank that is there already stays encoded."""
        if self.entries.device == torch.device(device):
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return SelectedMemory(bank_of(self.bank.entries.to(device), self.event_dim), self.rows.to(device), labels)

    def datapoints(self, index: slice) -> Memory:
        """The memories of the datapoints in `index`."""
        labels = None if self.labels is None else self.labels[index]
        return SelectedMemory(self.bank, self.rows[index], labels)

    @property
    def dtype(self) -> torch.dtype:
        """Of probabilities of the entries, as for any memory."""
        return super().dtype if self._whole is None else self._whole.dtype

    def held(self) -> Memory:
        """Itself: the bank holds what is encoded."""
        return self

    def encode(self, networks: Encoder, x: Tensor | None = None) -> Memory:
        """The same memories with `features`, from the bank's."""
        encoded = copy.copy(self)
        encoded._whole = whole = self.bank.encode(networks)
        named = hasattr(whole.features, "_fields")
        encoded.features = (
            _Gathered(whole.features, self.rows) if named else map_tensors(lambda f: f[self.rows], whole.features)
        )
        encoded._kept = True
        return encoded

    def encoded(self, networks: Encoder, x: Tensor | None = None) -> Memory:
        """As `encode`, which costs nothing the second time."""
        return self.encode(networks)

    def _select(self, rows: Tensor) -> Any:
        if self._whole is None:
            return super()._select(rows)
        return self._whole.read(self.rows.flatten()[rows])

    def _every(self) -> Any:
        if self._whole is None:
            return super()._every()
        every = self.rows.flatten()
        return map_tensors(lambda f: f.index_select(0, every), self._whole._every())


class _Gathered:
    """The fields of a bank's features at the rows of each datapoint; keys are wanted of all, maps are not."""

    def __init__(self, features: Any, rows: Tensor) -> None:
        self._features, self._rows = features, rows

    def __getattr__(self, name: str) -> Any:
        """A field, [B, S, *F] per tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        return map_tensors(lambda f: f[self._rows], getattr(self._features, name))


class _Bank(Memory):
    """A shared memory that is encoded in chunks, and holds what was encoded."""

    def encode(self, networks: Encoder, x: Tensor | None = None) -> Memory:
        """The same memory with features; computed once for the same networks."""
        if self._held is not None and self._held[0] is networks:
            return self._held[1]
        parts = [networks.encode(part) for part in self.entries.split(ENTRIES_PER_CHUNK)]
        encoded = copy.copy(self)
        encoded.features = _concatenated(parts)
        encoded._heads = getattr(networks, "heads", None)
        encoded._kept = True
        self._held = (networks, encoded)
        return encoded


def bank_of(entries: Tensor, event_dim: int = 3) -> Memory:
    """A bank to select from: entries [N, *E]."""
    return _Bank(entries, None, event_dim)


def _concatenated(parts: list[Any]) -> Any:
    """One structure of tensors from several."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    leaves = [_concatenated(list(leaf)) for leaf in zip(*parts, strict=True)]
    return type(parts[0])(*leaves) if hasattr(parts[0], "_fields") else tuple(leaves)
