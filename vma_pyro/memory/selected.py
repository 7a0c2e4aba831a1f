"""Memories of their own for many datapoints, all of entries of one bank, each of which is encoded once."""

from __future__ import annotations

import torch
from torch import Tensor

from vma_pyro.memory.checks import looks_at
from vma_pyro.memory.encoded import Encoded, Table, is_on
from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.memory import Memory


class SelectedMemory(Memory):
    """One memory per datapoint, of entries of a bank that all of them share.

    Args:
        bank: a shared memory [N, *E] without a mask. If it is encoded (see `vma_pyro.evaluation.encoded`), the
            same networks do not encode it again.
        rows: int64 [B, S], the entries of each datapoint's memory.
        labels: class of each entry, int64 [B, S].

    Attributes:
        entries: those selected [B, S, *E]; gathered when asked for.

    Raises:
        ValueError: a bank with a mask or of several memories, rows outside of it or of other dimensions.
    """

    def __init__(self, bank: Memory, rows: Tensor, labels: Tensor | None = None) -> None:
        if bank.mask is not None:
            raise ValueError("bank: expected every row to be an entry, got a memory with padding (a mask)")
        if not bank.is_shared:
            raise ValueError(f"bank: expected one shared memory, got entries {list(bank.entries.shape)}")
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"rows: expected int64, got {getattr(rows, 'dtype', type(rows).__name__)}")
        if rows.dim() != 2 or rows.numel() == 0:
            raise ValueError(f"rows: expected shape [B, S] with at least one entry, got {list(rows.shape)}")
        if looks_at("rows", rows) and not (int(rows.min()) >= 0 and int(rows.max()) < bank.size):
            low, high = int(rows.min()), int(rows.max())
            raise ValueError(f"rows: expected 0 to {bank.size - 1}, entries of the bank, got {low} to {high}")
        self.bank, self.rows = bank, rows
        self._describe(labels, bank.event_dim, None, bank.learned)
        self._checked = bank._checked

    @property
    def entries(self) -> Tensor:  # type: ignore[override]
        """The entries of each memory [B, S, *E], as the bank is now."""
        return self.bank.entries[self.rows]

    @property
    def lead(self) -> torch.Size:
        """[B, S]."""
        return self.rows.shape

    @property
    def entry_shape(self) -> torch.Size:
        """E, the shape of one entry."""
        return self.bank.entry_shape

    @property
    def values(self) -> Tensor:
        """The entries that checks look at: the whole bank, once for all that is selected from it."""
        return self.bank.values

    def to(self, device: torch.device | str) -> Memory:
        """Move bank and rows; itself where they are on that device already."""
        if is_on(self.values, device):
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return SelectedMemory(self.bank.to(device), self.rows.to(device), labels)

    def datapoints(self, index: slice) -> Memory:
        """Return the memories of the datapoints in `index`."""
        return SelectedMemory(self.bank, self.rows[index], None if self.labels is None else self.labels[index])

    def encode(self, networks: Encoder) -> Encoded:
        """Encode each entry of the bank that is selected, once; none if the bank is encoded by these networks."""
        bank = self.bank
        if isinstance(bank, Encoded) and bank.is_whole and bank.is_of(networks):
            return Encoded(self, networks, bank.table, self.rows)
        if len(bank.entries) <= self.rows.numel():
            return Encoded(self, networks, Table.of(bank.entries, networks), self.rows)
        used, rows = self.rows.unique(return_inverse=True)
        return Encoded(self, networks, Table.of(bank.entries[used], networks), rows)
