"""A memory of a bank of which some entries are encoded, and others when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vma_pyro.memory.bank_memory import BankMemory
from vma_pyro.memory.encoded import Encoded, Table, version_of
from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.reading import joined


class Retrieved(Encoded):
    """A memory of a bank with the encodings of some entries; others are encoded when they are read.

    Args:
        memory: of a bank.
        networks: by which.
        addresses: sorted, of the entries that are encoded now, int64 [P]; may be none.
        near: the datapoints that they were found for.

    Attributes:
        candidates: features of the entries at `addresses`; tensors [P, *F].
    """

    def __init__(
        self, memory: BankMemory, networks: Encoder, addresses: Tensor, near: Tensor | None = None
    ) -> None:
        self.memory: BankMemory = memory
        self.networks, self.addresses, self.near = networks, addresses, near
        self.with_gradient = torch.is_grad_enabled()
        self._last_read = self._last_check = None
        if len(addresses):
            self.table = self._encoded(addresses)

    def _encoded(self, addresses: Tensor) -> Table:
        return Table.of(self.memory.bank.entries_at(self.memory.rows_of(addresses)), self.networks)

    @property
    def is_whole(self) -> bool:
        """Whether the table is of all entries; it is of candidates."""
        return False

    @property
    def candidates(self) -> Any:
        """Features of the entries that are encoded."""
        return self.table.features

    @property
    def features(self) -> Any:
        """Refused: that would encode the bank."""
        raise ValueError(
            f"memory.features: expected a memory whose entries are all encoded, got one of a bank of {self.size}, "
            f"of which {len(self.addresses)} are; a prior or guide that scores every entry by what it holds needs "
            "Memory(entries)"
        )

    @property
    def num_entries(self) -> Tensor:
        """Entries of each memory, without what is left out."""
        return self.memory.num_entries

    @property
    def dtype(self) -> torch.dtype:
        """What probabilities of the entries are computed in: the type of the networks, in 32 bits or more."""
        parameter: Any = next(iter(self.networks.parameters()), None)  # type: ignore[attr-defined]
        return torch.promote_types(self.memory.dtype if parameter is None else parameter.dtype, torch.float32)

    def datapoints(self, index: slice) -> Memory:
        """The memory of the datapoints in `index`; one that is shared is this one."""
        return self if self.is_shared else self.memory.datapoints(index)

    def is_of(self, networks: Encoder) -> bool:
        """As of `Encoded`."""
        return networks is self.networks and (self.with_gradient or not torch.is_grad_enabled())

    def read(self, address: Tensor) -> Any:
        """m_a; entries that are not encoded are now.

        Args:
            address: as in `Memory.read`, but no weights.
        """
        state, last = (version_of(address), torch.is_grad_enabled()), self._last_read
        if last is not None and last[0] is address and last[1] == state:
            return last[2]
        table, rows = self._with(self.memory.spread(address))
        found = table.heads_at(rows)
        if torch.is_grad_enabled() or self.with_gradient:  # evaluations hold on to nothing
            self._last_read = (address, state, found)
        return found

    def _with(self, address: Tensor) -> tuple[Table, Tensor]:
        """A table with all that is read, and the rows in it of what is read."""
        known = self.addresses
        if not len(known):
            new, rows = address.unique(return_inverse=True)
            return self._encoded(new), rows
        at = torch.searchsorted(known, address.contiguous()).clamp_(max=len(known) - 1)
        missing = known[at] != address
        if not bool(missing.any()):
            return self.table, at
        new, rows = address[missing].unique(return_inverse=True)
        table = Table(joined([self.table.features, self._encoded(new).features]), self.networks)
        return table, at.masked_scatter(missing, rows + len(known))
