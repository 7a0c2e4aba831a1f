"""A memory of entries of a bank with keys, of which an update encodes only what it reads or might read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro.memory.checks import looks_at
from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.keyed import KeyedBank
from vma_pyro.memory.memory import Memory

if TYPE_CHECKING:
    from vma_pyro.memory.encoded import Encoded


class BankMemory(Memory):
    """One memory that all datapoints share, of entries of a bank; each may have one entry that is left out for it.

    What is left out for a datapoint is no entry of its memory: `masked` takes it out of p(a | M), a guide out of
    q(a | x, M), and programs that forget it are refused.

    Args:
        bank: of the entries.
        rows: those of the memory, int64 [S]; None: all.
        left_out: for each datapoint the address that is no entry for it, int64 [B]; None: all are.

    Attributes:
        entries: [S, *E], or [B, S, *E] where some are left out; gathered when asked for.

    Raises:
        ValueError: rows outside of the bank, addresses outside of the memory, either of another type than int64
            or int32; a single entry that is left out.
    """

    def __init__(
        self, bank: KeyedBank, rows: Int[Tensor, " S"] | None = None, left_out: Int[Tensor, " B"] | None = None
    ) -> None:
        self.bank, self.rows, self.left_out = bank, rows, left_out
        _check_range("rows", rows, len(bank), "entries of the bank")
        _check_range("left_out", left_out, self.size, "addresses of the memory")
        if left_out is not None and self.size < 2:
            raise ValueError("left_out: expected an entry beside the one that is left out, got a memory of 1")
        labels = bank.memory.labels
        labels = labels if labels is None or rows is None else labels[rows]
        if labels is not None and left_out is not None:
            labels = labels.expand(self.lead)
        self._describe(labels, bank.memory.event_dim, None, bank.memory.learned)
        self._checked = bank.memory._checked

    @property
    def size(self) -> int:
        """|M| = S, of which one may be left out."""
        return len(self.bank) if self.rows is None else len(self.rows)

    @property
    def lead(self) -> torch.Size:
        """[S], or [B, S] where each datapoint has an entry that is left out."""
        return torch.Size([self.size] if self.left_out is None else [len(self.left_out), self.size])

    @property
    def entry_shape(self) -> torch.Size:
        """E, the shape of one entry."""
        return self.bank.memory.entry_shape

    @property
    def num_entries(self) -> Tensor:
        """Entries of each memory, int64 [] or [B]."""
        return torch.full(self.lead[:-1], self.size - (self.left_out is not None), device=self.device)

    @property
    def values(self) -> Tensor:
        """The entries that checks look at: the whole bank, once."""
        return self.bank.memory.values

    @property
    def entries(self) -> Tensor:  # type: ignore[override]
        """The entries [S, *E], or [B, S, *E], of which one for each datapoint is left out."""
        entries = self.bank.memory.entries if self.rows is None else self.bank.memory.entries[self.rows]
        return entries.expand(*self.lead, *self.entry_shape)

    def to(self, device: torch.device | str) -> Memory:
        """The same memory, whose bank moves to the device for good."""
        self.bank.move(device)
        rows, left_out = (None if t is None else t.to(device) for t in (self.rows, self.left_out))
        return BankMemory(self.bank, rows, left_out)

    def datapoints(self, index: slice) -> Memory:
        """The memory of the datapoints in `index`."""
        return self if self.left_out is None else BankMemory(self.bank, self.rows, self.left_out[index])

    def masked(self, logits: Tensor) -> Tensor:
        """Logits of the address [..., S], -inf at what is left out [..., B, S]."""
        if self.left_out is None:
            return logits
        logits = logits.expand(torch.broadcast_shapes(logits.shape, self.lead))
        at = self.left_out.unsqueeze(-1).expand(*logits.shape[:-1], 1)
        return logits.scatter(-1, at, -math.inf)

    def encode(self, networks: Encoder) -> Encoded:
        """The memory, whose entries these networks encode as they are read."""
        from vma_pyro.memory.retrieved import Retrieved  # which is a memory, too

        return Retrieved(self, networks, torch.empty(0, dtype=torch.long, device=self.device))

    def read(self, address: Tensor) -> Any:
        """m_a as of `Memory.read`, where nothing encodes the entries."""
        return self.bank.memory.read(self.rows_of(self.spread(address)))

    def spread(self, address: Tensor) -> Int[Tensor, "..."]:
        """Addresses as they are; of a memory for each datapoint, in a last dimension of B.

        Raises:
            ValueError: weights in place of addresses, or addresses of another number of datapoints.
        """
        if address.is_floating_point():
            raise ValueError("address: expected addresses, as a soft read encodes all of a bank, got weights")
        if self.left_out is None:
            return address
        if address.dim() == 0 or address.shape[-1] not in (1, len(self.left_out)):
            raise ValueError(f"address: expected shape [..., {len(self.left_out)}], got {list(address.shape)}")
        return address.expand(*address.shape[:-1], len(self.left_out))

    def rows_of(self, address: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Rows of the bank that addresses stand for."""
        return address if self.rows is None else self.rows[address]

    def is_searched(self, *, total: int, least: int, number: int) -> bool:
        """Whether `find` looks for candidates of so many datapoints, as there are more entries than it wants."""
        return self.size > max(total, max(least, total // number) + 1)

    @torch.no_grad()
    def find(
        self,
        query: Float[Tensor, "B E"],
        networks: Encoder,
        similarity: Any,
        *,
        total: int,
        least: int,
        fill: bool,
    ) -> Int[Tensor, " P"]:
        """The addresses that an update encodes beforehand, for all of its datapoints together; sorted.

        Args:
            query: keys of the datapoints.
            networks, similarity: that made them, and compares them.
            total: P, addresses in all.
            least: for each datapoint, if that should be more.
            fill: whether what the datapoints have in common is made up for by the entries that are next in turn:
                their keys are renewed, and P is the same in every update.
        """
        size, each = self.size, max(least, total // len(query))
        if not self.is_searched(total=total, least=least, number=len(query)):
            return torch.arange(size, device=self.device)
        found = self.bank.nearest(query, each, networks, similarity, rows=self.rows, left_out=self.left_out)
        chosen = torch.zeros(size, dtype=torch.bool, device=self.device)
        chosen[found.flatten()] = True
        missing = total - int(chosen.sum())
        if fill and missing > 0:
            order = (torch.arange(size, device=self.device) + self.bank.cursor) % size
            more = order[~chosen[order]][:missing]
            chosen[more] = True
            self.bank.cursor = int(more[-1]) + 1
        return chosen.nonzero().squeeze(1)


def _check_range(name: str, values: Tensor | None, size: int, what: str) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name}: expected one dimension and at least one value, got shape {list(values.shape)}")
    if looks_at(name, values) and not (int(values.min()) >= 0 and int(values.max()) < size):
        low, high = int(values.min()), int(values.max())
        raise ValueError(f"{name}: expected 0 to {size - 1}, {what}, got {low} to {high}")
