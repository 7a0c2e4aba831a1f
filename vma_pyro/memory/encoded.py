"""A memory with what networks make of every entry: a value as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.padding import centred
from vma_pyro.memory.reading import first_tensor, joined, map_tensors, mean, rows_at, select

ENTRIES_PER_CHUNK = 2048  # encoded at a time where no gradient is wanted


class Table:
    """What networks make of entries, a row for each: their features, and of these their heads.

    Args:
        features: a tensor or a (named) tuple of tensors [R, *F].
        networks: that made them. They may have `heads`, from features to what is needed of an entry that is read,
            and `marked`, from what was read of a constant table and its rows to the same with a note of these.
    """

    def __init__(self, features: Any, networks: Encoder) -> None:
        self.features = features
        self.networks = networks
        self.with_gradient = torch.is_grad_enabled()
        self._heads = getattr(networks, "heads", None)
        self._all: tuple[Any, Any] | None = None  # of a constant table: whether in training, heads of every row

    @classmethod
    def of(cls, entries: Tensor, networks: Encoder) -> Table:
        """Encode entries [R, *E]; without a gradient some at a time, as their activations need far more room."""
        if torch.is_grad_enabled() or len(entries) <= ENTRIES_PER_CHUNK:
            return cls(networks.encode(entries), networks)
        return cls(joined([networks.encode(part) for part in entries.split(ENTRIES_PER_CHUNK)]), networks)

    def __len__(self) -> int:
        """Number of rows."""
        return len(first_tensor(self.features))

    @property
    def is_constant(self) -> bool:
        """Whether no gradient was wanted, nor is: the table of an evaluation, which is read many times."""
        return not (torch.is_grad_enabled() or first_tensor(self.features).requires_grad)

    def heads(self) -> Any:
        """Return the heads of all rows; of a constant table they are computed once.

        A graph is not kept: checkpointed runs (`chunk_size`) compute anew what they have computed.
        """
        if self._heads is None:
            return self.features
        if not self.is_constant:
            return self._heads(self.features)
        mode = getattr(self.networks, "training", False)
        if self._all is None or self._all[0] != mode:
            self._all = (mode, self._heads(self.features))
        return self._all[1]

    def heads_at(self, rows: Tensor) -> Any:
        """Return the heads at rows of any shape, computed of these or of all, whichever are fewer."""
        few = rows.numel() < len(self) and not self.is_constant
        if self._heads is None or not few:
            found = select(self.heads(), rows)
            marked = getattr(self.networks, "marked", None)
            return marked(found, rows) if self.is_constant and marked is not None else found
        heads = self._heads(select(self.features, rows.flatten()))
        return map_tensors(lambda t: t.reshape(*rows.shape, *t.shape[1:]), heads)


class Encoded(Memory):
    """The memory, the networks that encoded it, and what they made of every entry as their parameters were then.

    Made by `Memory.encode`. It has all that the memory has, and `read` gives what the networks' `heads` make of
    the entries that are read. A copy of it is the memory, not encoded: encodings belong to networks.

    Args:
        memory: which was encoded.
        networks: by which.
        table: what they made of the entries.
        rows: int64 [B, S], the row of each entry in the table; None: entry a of datapoint b is in row b S + a.
    """

    def __init__(self, memory: Memory, networks: Encoder, table: Table, rows: Tensor | None = None) -> None:
        if type(memory).read is not Memory.read:
            raise TypeError(
                f"memory: expected the method `read` of Memory, got that of {type(memory).__name__}; what is read "
                "is for the `heads` of the networks to say"
            )
        self.memory, self.networks, self.table, self._rows = memory, networks, table, rows
        # What was found last, so that model and guide share it: arguments, their state, result.
        self._last_read: tuple[Tensor, tuple[int, bool], Any] | None = None
        self._last_check: tuple[Tensor, int] | None = None

    def __getattr__(self, name: str) -> Any:
        """Entries, labels, mask, ... of the memory."""
        if name.startswith("__") or name == "memory":
            raise AttributeError(name)
        return getattr(self.memory, name)

    @property
    def is_whole(self) -> bool:
        """Whether the table is of all entries."""
        return True

    def __reduce__(self) -> Any:
        """Stand for the memory alone in a copy or a file."""
        return _itself, (self.memory,)

    @property
    def lead(self) -> torch.Size:
        """[S] of one memory for all datapoints, [B, S] of one for each."""
        return self.memory.lead

    @property
    def dtype(self) -> torch.dtype:
        """What probabilities of the entries are computed in: the type of their features, in 32 bits or more."""
        return torch.promote_types(first_tensor(self.table.features).dtype, torch.float32)

    @property
    def values(self) -> Tensor:
        """The entries that checks look at, as of the memory."""
        return self.memory.values

    @property  # not kept: a view that was made without gradients would have none
    def features(self) -> Any:
        """Features of every entry: the structure that the networks return, with tensors [S, *F] or [B, S, *F].

        A `key` of padding is the mean of its memory's keys.
        """
        if self._rows is not None:
            return _gathered(self.table.features, self._rows)
        features = map_tensors(lambda t: t.reshape(*self.lead, *t.shape[1:]), self.table.features)
        return features if self.mask is None else centred(features, self.mask)

    def to(self, device: torch.device | str) -> Memory:
        """Move the memory, which is not encoded there; itself where it is on that device already."""
        return self if is_on(self.values, device) else self.memory.to(device)

    def datapoints(self, index: slice) -> Memory:
        """Return the memory of the datapoints in `index`: this one if shared, else a part that is not encoded."""
        return self if self.is_shared else self.memory.datapoints(index)

    def encode(self, networks: Encoder) -> Encoded:
        """Return this very value for the networks that made it, else what others make of the memory.

        One that was made without gradients is made again where they are wanted.
        """
        return self if self.is_of(networks) else self.memory.encode(networks)

    def is_of(self, networks: Encoder) -> bool:
        """Whether these networks have made it, with gradients if they are wanted now."""
        return networks is self.networks and (self.table.with_gradient or not torch.is_grad_enabled())

    def masked(self, logits: Tensor) -> Tensor:
        """Mask logits as the memory does."""
        return self.memory.masked(logits)

    def check(self, x: Tensor) -> None:
        """Refuse datapoints that do not fit, as the memory does; the same ones are looked at once."""
        last, version = self._last_check, version_of(x)
        if last is None or last[0] is not x or last[1] != version:
            self.memory.check(x)
            self._last_check = (x, version)

    def read(self, address: Tensor) -> Any:
        """m_a: what the networks' `heads` (or, without them, `encode`) give for the entries at the addresses.

        Args:
            address: as in `Memory.read`.

        Returns:
            The structure that the heads return, with tensors [*address.shape, *F].
        """
        # The model reads what the guide has just read at the very same addresses; evaluations hold on to nothing.
        state, last = (version_of(address), torch.is_grad_enabled()), self._last_read
        if last is not None and last[0] is address and last[1] == state:
            return last[2]
        if address.is_floating_point():
            found = mean(self.table.heads(), address, self.lead, self._rows)
        else:
            found = self.table.heads_at(rows_at(address, self.lead, self._rows))
        if not self.table.is_constant:
            self._last_read = (address, state, found)
        return found


def version_of(values: Tensor) -> int:
    """How often values have been changed in place; those of inference mode cannot be outside of it."""
    return 0 if values.is_inference() else values._version


def is_on(values: Tensor, device: torch.device | str) -> bool:
    """Whether values are on a device; "cuda" is the present one of several."""
    device = torch.device(device)
    return values.device == device or values.device == torch.empty(0, device=device).device


def _itself(memory: Memory) -> Memory:
    return memory


def _gathered(features: Any, rows: Tensor) -> Any:
    if hasattr(features, "_fields"):
        return _Gathered(features, rows)
    return map_tensors(lambda t: t[rows], features)


class _Gathered:
    """The fields of a table's features at the rows of each datapoint; keys are wanted of all, maps are not."""

    def __init__(self, features: Any, rows: Tensor) -> None:
        self._features, self._rows = features, rows

    def __getattr__(self, name: str) -> Any:
        """Gather a field, [B, S, *F] per tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        return map_tensors(lambda t: t[self._rows], getattr(self._features, name))
