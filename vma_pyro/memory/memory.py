"""The memory M: a bank of entries, read by address.

A memory is a tensor of entries and nothing else; the address is a sample site of the model. Entries may be
images (the default), or anything with `event_dim` trailing dimensions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vma_pyro.memory.checks import check_alike, check_finite, check_labels, looks_at
from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.padding import filled, stacked
from vma_pyro.memory.reading import mean, rows_at, select

if TYPE_CHECKING:
    from vma_pyro.memory.encoded import Encoded


class Memory:
    """M = (m_1, ..., m_S), shared by all datapoints or one per datapoint; not to be changed once made.

    Memories of different sizes stand in one batch with a mask (see also `padded`). What is masked is padding: it
    counts for nothing, whatever it holds, NaN included. Programs put their logits of the address through `masked`;
    a similarity or a prior that scores each entry by itself need not know of masks, nor one that centres on the
    mean of the keys. One that mixes entries in another way has to leave the padding out by itself (`mask`).

    Args:
        entries: [S, *E] shared by every datapoint, or [B, S, *E], one memory per datapoint.
        labels: class of each entry, int64 [S] or [B, S]; only classification and reports read it.
        event_dim: number of dimensions of one entry, E; 3 for images [1, 28, 28].
        mask: bool [S] or [B, S], True where there is an entry and False where there is padding; None: all are
            entries.
        learned: whether the entries are what parameters hold, such as ink probabilities; a binary model then takes
            values between 0 and 1. So it does of entries that require a gradient.

    Attributes:
        entries: those given; padding repeats its memory's first entry, so that all values are those of entries.

    Raises:
        ValueError: no entries, wrong number of dimensions, labels below 0, labels or mask of another shape, a mask
            of another type, NaN or infinity.
    """

    def __init__(
        self,
        entries: Tensor,
        labels: Tensor | None = None,
        event_dim: int = 3,
        *,
        mask: Tensor | None = None,
        learned: bool = False,
    ) -> None:
        shape = list(entries.shape)
        if entries.dim() - event_dim not in (1, 2):
            raise ValueError(
                f"memory.entries: expected {event_dim + 1} dimensions [S, *E] or {event_dim + 2} [B, S, *E], got "
                f"shape {shape}"
            )
        self.entries = entries if mask is None else filled(entries, mask, event_dim)
        self._describe(labels, event_dim, mask, learned)
        self._checked: set[str] = set()  # looks taken at the values of the entries; what is made of them shares it
        check_finite("memory.entries", self.entries)

    def _describe(self, labels: Tensor | None, event_dim: int, mask: Tensor | None, learned: bool) -> None:
        """Note all but the entries, and refuse what does not fit them."""
        self.labels, self.event_dim, self.mask, self.learned = labels, event_dim, mask, learned
        shape = [*self.lead, *self.entry_shape]
        if 0 in self.lead:
            raise ValueError(f"memory.entries: expected at least one entry, got shape {shape}")
        if labels is not None:
            check_labels("memory.labels", labels, self.lead, mask)

    @staticmethod
    def padded(memories: Sequence[Memory | Tensor]) -> Memory:
        """One memory for each datapoint, of as many entries as it has: [B, S, *E], S the most, and a mask.

        Args:
            memories: of each datapoint, a shared `Memory` or entries [S_b, *E] of images; all with labels or none.

        Returns:
            A memory whose padding has the label -1.

        Raises:
            ValueError: no memories, one memory per datapoint among them, entries of different shapes, types or
                devices, labels for some only.
        """
        each = [Memory.of(memory) for memory in memories]
        entries, labels, mask = stacked(each)
        return Memory(
            entries, labels, each[0].event_dim, mask=mask, learned=any(memory.learned for memory in each)
        )

    @staticmethod
    def of(memory: Memory | Tensor) -> Memory:
        """The memory itself, or a memory of images around a plain tensor."""
        return memory if isinstance(memory, Memory) else Memory(memory)

    @property
    def lead(self) -> torch.Size:
        """[S] of one memory for all datapoints, [B, S] of one for each."""
        return self.entries.shape[: self.entries.dim() - self.event_dim]

    @property
    def entry_shape(self) -> torch.Size:
        """E, the shape of one entry."""
        return self.entries.shape[self.entries.dim() - self.event_dim :]

    @property
    def is_shared(self) -> bool:
        """Whether one memory [S, *E] serves every datapoint."""
        return len(self.lead) == 1

    @property
    def size(self) -> int:
        """|M| = S, the number of entries that one datapoint can address."""
        return self.lead[-1]

    @property
    def batch_size(self) -> int | None:
        """B for one memory per datapoint, None for a shared memory."""
        return None if self.is_shared else self.lead[0]

    @property
    def num_entries(self) -> Tensor:
        """Entries of each memory without padding, int64 [] or [B]."""
        if self.mask is None:
            return torch.full(self.lead[:-1], self.size, device=self.device)
        return self.mask.sum(-1)

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """What probabilities of the entries are computed in: their own type, in 32 bits or more."""
        return torch.promote_types(self.values.dtype, torch.float32)

    @property
    def values(self) -> Tensor:
        """The entries that checks look at: all of them, of any shape [..., *E]."""
        return self.entries

    def to(self, device: torch.device | str) -> Memory:
        """Move the memory to another device."""
        return self._each(lambda tensor: tensor.to(device))

    def masked(self, logits: Tensor) -> Tensor:
        """Logits of the address in 32 bits or more, as probabilities are made of them; -inf on padding.

        Args:
            logits: [..., S], or [..., B, S].
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.mask is None else logits.masked_fill(~self.mask, -math.inf)

    def datapoints(self, index: slice) -> Memory:
        """The memory of the datapoints in `index`: itself if shared, else a slice of dimension B."""
        return self if self.is_shared else self._each(lambda tensor: tensor[index])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Memory:
        other = copy.copy(self)
        other.entries = function(self.entries)
        other.labels, other.mask = (None if t is None else function(t) for t in (self.labels, self.mask))
        return other

    def encode(self, networks: Encoder) -> Encoded:
        """Have networks make features of every entry, and return both.

        Programs call this; an objective has the guide's `prepare` do it once for all runs of both. Gradients flow
        through what is returned to the parameters, for which it stands as they are now: make a new one after an
        update.
        """
        from vma_pyro.memory.encoded import Encoded, Table  # which is a memory, too

        return Encoded(self, networks, Table.of(self.entries.reshape(-1, *self.entry_shape), networks))

    def read(self, address: Tensor) -> Any:
        """m_a: the entries at the addresses.

        Args:
            address: int64, any shape that broadcasts to [..., B]: [K, B] for particles, [S, 1, 1] when Pyro
                enumerates it. Or weights, float [..., B, S]: a soft read, the weighted mean of the entries.

        Returns:
            [*address.shape, *E] (of weights [..., B, *E]); for one memory per datapoint the last dimension of the
            address is first expanded to B.
        """
        flat = self.entries.reshape(-1, *self.entry_shape)
        if address.is_floating_point():
            return mean(flat, address, self.lead)
        return select(flat, rows_at(address, self.lead))

    def check(self, x: Tensor) -> None:
        """Refuse datapoints that do not fit this memory.

        Args:
            x: [B, *E].

        Raises:
            ValueError: another shape than the entries, another batch than the memories, no datapoints, NaN or
                infinity; images from 0 to 1 beside entries from 0 to 255.

        Warns:
            UserWarning: ink and paper changed places between x and the entries.
        """
        if x.dim() != self.event_dim + 1 or x.shape[1:] != self.entry_shape:
            raise ValueError(
                f"x: expected shape [B, {', '.join(map(str, self.entry_shape))}] like the memory's entries, "
                f"got {list(x.shape)}"
            )
        if not self.is_shared and len(x) != self.lead[0]:
            raise ValueError(
                f"x: expected {self.lead[0]} datapoints, one per memory, got {len(x)} "
                f"(memory {[*self.lead, *self.entry_shape]}, x {list(x.shape)})"
            )
        if len(x) == 0:
            raise ValueError(f"x: expected at least one datapoint, got shape {list(x.shape)}")
        check_finite("x", x)
        if self.event_dim == 3 and self._is_unchecked("like x"):
            if check_alike(x, self.values):
                self._checked.add("inverted")
            self._checked.add("like x")  # now that nothing has been refused

    def check_values(self, likelihood: Any) -> None:
        """Refuse entries that a likelihood cannot score, unless they are learned; each kind looks once per memory.

        Args:
            likelihood: a `Likelihood`, whose `check` and `warn` look at the entries.

        Raises:
            ValueError: values that it cannot score.
        """
        # Not by identity: copies of a model are of one kind.
        plain = {k: v for k, v in vars(likelihood).items() if not k.startswith("_") and k != "training"}
        kind = f"entries of {type(likelihood).__module__}.{type(likelihood).__qualname__} {plain}"
        if not (self.learned or self.values.requires_grad) and self._is_unchecked(kind):
            likelihood.check("memory.entries", self.values)
            if "inverted" not in self._checked:  # which has been said
                likelihood.warn("memory.entries", self.values)
            self._checked.add(kind)

    def _is_unchecked(self, check: str) -> bool:
        """Whether the entries have not passed this look at their values yet."""
        return looks_at(check, self.values) and check not in self._checked
