"""The memory M: a bank of entries, read by address.

A memory is a tensor of entries and nothing else; the address is a sample site of the model. Entries may be
images (the default), or anything with `event_dim` trailing dimensions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vma_pyro.memory.checks import check_alike, check_finite, check_labels, looks_at
from vma_pyro.memory.padding import centred, filled, stacked


class Encoder(Protocol):
    """What `Memory.encode` needs of the networks: features of a flat batch of entries.

    They may also have `heads`, from features to what is needed of an entry that is read, tensors [N, *F] both.
    """

    def encode(self, entries: Tensor) -> Any:
        """Features of entries [N, *E]: a tensor [N, *F] or a (named) tuple of such tensors."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the features depend on."""


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
        features: what the networks made of each entry, or None; see `encode`.

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
        self.entries, self.labels, self.event_dim = entries, labels, event_dim
        self.mask, self.learned = mask, learned
        self._seen: set[str] = set()  # looks taken at the values of the entries; copies share it
        self.features: Any = None
        self._left: tuple[Encoder, Tensor, bool, Memory] | None = None  # by the guide, for the model
        self._held: tuple[Encoder, Memory] | None = None
        self._holding = False
        self._kept = False  # by a memory that is held
        self._heads: Callable[[Any], Any] | None = None  # of the networks
        self._all: tuple[bool, Any] | None = None  # heads of every entry, and whether with their graph
        self._last: tuple[Tensor, tuple[int, bool], Any] | None = None  # address, its state, what was read
        lead = self.entries.dim() - self.event_dim
        shape = list(self.entries.shape)
        if lead not in (1, 2):
            raise ValueError(
                f"memory.entries: expected {self.event_dim + 1} dimensions [S, *E] or {self.event_dim + 2} "
                f"[B, S, *E], got shape {shape}"
            )
        if self.size == 0:
            raise ValueError(f"memory.entries: expected at least one entry, got shape {shape}")
        if self.labels is not None and self.labels.shape != self.entries.shape[:lead]:
            raise ValueError(
                f"memory.labels: expected shape {shape[:lead]}, one label per entry, got {list(self.labels.shape)}"
            )
        if mask is not None:
            self.entries = filled(self.entries, mask, event_dim)
        if self.labels is not None:
            check_labels("memory.labels", self.labels, mask)
        check_finite("memory.entries", self.entries)

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
        entries, labels, mask = stacked([Memory.of(memory) for memory in memories])
        first = Memory.of(memories[0])
        learned = any(Memory.of(memory).learned for memory in memories)
        return Memory(entries, labels, first.event_dim, mask=mask, learned=learned)

    @staticmethod
    def of(memory: Memory | Tensor) -> Memory:
        """The memory itself, or a memory of images around a plain tensor."""
        return memory if isinstance(memory, Memory) else Memory(memory)

    @property
    def is_shared(self) -> bool:
        """Whether one memory [S, *E] serves every datapoint."""
        return self.entries.dim() == self.event_dim + 1

    @property
    def size(self) -> int:
        """|M| = S, the number of entries that one datapoint can address."""
        return self.entries.shape[-self.event_dim - 1]

    @property
    def num_entries(self) -> Tensor:
        """Entries of each memory without padding, int64 [] or [B]."""
        lead = self.entries.shape[: self.entries.dim() - self.event_dim]
        if self.mask is None:
            return torch.full(lead[:-1], self.size, device=self.entries.device)
        return self.mask.sum(-1)

    @property
    def dtype(self) -> torch.dtype:
        """Of probabilities of the entries: that of their features, if encoded, in 32 bits or more."""
        source = self.entries if self.features is None else _first_of(self.features)
        return torch.promote_types(source.dtype, torch.float32)

    @property
    def batch_size(self) -> int | None:
        """B for one memory per datapoint, None for a shared memory."""
        return None if self.is_shared else self.entries.shape[0]

    @property
    def entry_shape(self) -> torch.Size:
        """E, the shape of one entry."""
        return self.entries.shape[self.entries.dim() - self.event_dim :]

    def to(self, device: torch.device | str) -> Memory:
        """The same memory, not encoded, on another device."""
        other = copy.copy(self)
        other.entries = self.entries.to(device)
        other.labels, other.mask = (None if t is None else t.to(device) for t in (self.labels, self.mask))
        return other

    def masked(self, logits: Tensor) -> Tensor:
        """Logits of the address, -inf on padding; themselves, if there is no mask.

        Args:
            logits: [..., S], or [..., B, S].
        """
        return logits if self.mask is None else logits.masked_fill(~self.mask, -math.inf)

    def __getstate__(self) -> dict[str, Any]:
        """Entries, labels and mask only."""
        return self.__dict__ | NOT_ENCODED | {"_holding": False}

    def __copy__(self) -> Memory:
        """A memory that shares the tensors, without anything left or held."""
        other = object.__new__(type(self))
        # What has been checked once is not checked again in every update.
        other.__dict__.update(self.__dict__, **NOT_ENCODED)
        other._holding = other._kept = False
        return other

    def datapoints(self, index: slice) -> Memory:
        """The memory of the datapoints in `index`: itself if shared, else a slice of dimension B."""
        if self.is_shared:
            return self
        part = copy.copy(self)
        part.entries = self.entries[index]
        part.labels, part.mask = (None if t is None else t[index] for t in (self.labels, self.mask))
        return part

    def encode(self, networks: Encoder, x: Tensor | None = None) -> Memory:
        """The same memory with `features` of every entry: [S, *F] or [B, S, *F] per tensor.

        The guide calls this. It leaves the result for the model, which runs next on the same x and picks it up
        with `encoded`: each entry is encoded once per update.

        Args:
            networks: the encoder.
            x: the datapoints for which the model may pick the result up; None leaves nothing.
        """
        if self._held is not None and self._held[0] is networks:
            return self._held[1]
        lead = self.entries.shape[: self.entries.dim() - self.event_dim]
        flat = self.entries.reshape(-1, *self.entry_shape)
        flat, repeated = (flat, None) if self.is_shared else _distinct(flat)
        features = networks.encode(flat)
        if repeated is not None:
            features = map_tensors(lambda f: f.index_select(0, repeated), features)
        encoded = copy.copy(self)
        features = map_tensors(lambda f: f.reshape(*lead, *f.shape[1:]), features)
        encoded.features = features if self.mask is None else centred(features, self.mask)
        encoded._heads = getattr(networks, "heads", None)
        if self._holding:
            self._held, encoded._kept = (networks, encoded), True
        if x is not None:
            self._left = (networks, x, torch.is_grad_enabled(), encoded)
        return encoded

    def encoded(self, networks: Encoder, x: Tensor | None = None) -> Memory:
        """What the guide has just encoded for this very x, else a fresh encoding; the model calls this.

        It is picked up once only: two losses of one memory have graphs of their own. A run of the model without
        gradients leaves it for the one with. Where the guide runs without a run of the model with gradients after
        it, and the parameters change before the model runs alone, give the model another `Memory`.
        """
        left, self._left = self._left, None
        if left is not None and x is not None:
            by, for_x, with_grad, encoded = left
            wanted = torch.is_grad_enabled()
            if by is networks and for_x is x and (with_grad or not wanted):
                if with_grad and not wanted:
                    self._left = left
                return encoded
        return self.encode(networks)

    def held(self) -> Memory:
        """A copy that is encoded only once, for as long as it lives.

        For evaluation: use it only while no parameter changes and no gradient is taken.
        """
        copy_ = copy.copy(self)
        copy_._holding = True
        return copy_

    def read(self, address: Tensor) -> Any:
        """m_a: what the networks make of the entries at the addresses; the entries themselves, if not encoded.

        The networks' `heads` are computed of the entries that are read or of all of them, whichever are fewer.

        Args:
            address: int64, any shape that broadcasts to [..., B]: [K, B] for particles, [S, 1, 1] when Pyro
                enumerates it. Or weights, float [..., B, S]: a soft read, the weighted mean of the entries.

        Returns:
            The structure that `heads` (or, without them, `encode`) returns, with tensors [*address.shape, *F]; for
            one memory per datapoint the last dimension of the address is first expanded to B.
        """
        # The model reads what the guide has just read at the very same addresses; evaluations hold on to nothing.
        state = (address._version, torch.is_grad_enabled())
        if self._last is not None and self._last[0] is address and self._last[1] == state:
            return self._last[2]
        found = self._mean(address) if address.is_floating_point() else self._select(self._rows(address))
        if self.features is not None and not self._kept:
            self._last = (address, state, found)
        return found

    def _rows(self, address: Tensor) -> Tensor:
        """Of the flattened memories, where entry a of datapoint b is row b S + a."""
        if self.is_shared:
            return address
        batch = self.entries.shape[0]
        if address.dim() == 0 or address.shape[-1] not in (1, batch):
            raise ValueError(f"address: expected shape [..., {batch}], got {list(address.shape)}")
        return torch.arange(batch, device=address.device) * self.size + address

    def _select(self, rows: Tensor) -> Any:
        few = rows.numel() < self.size * (self.batch_size or 1) and not self._kept and self._all is None
        source, heads = (self._flat(), self._heads) if few else (self._every(), None)
        # index_select has a much faster backward pass on a CPU than advanced indexing.
        found = map_tensors(lambda f: f.index_select(0, rows.flatten()), source)
        found = found if heads is None else heads(found)
        return map_tensors(lambda f: f.reshape(*rows.shape, *f.shape[1:]), found)

    def _mean(self, weights: Tensor) -> Any:
        def mean(flat: Tensor) -> Tensor:
            flat = flat if flat.is_floating_point() else flat.to(weights.dtype)
            share = weights.to(flat.dtype)
            if self.is_shared:
                return torch.tensordot(share, flat, 1)
            rows = flat.reshape(*self.entries.shape[:2], -1)
            return torch.einsum("...bs,bsf->...bf", share, rows).reshape(*share.shape[:-1], *flat.shape[1:])

        return map_tensors(mean, self._every())

    def _flat(self) -> Any:
        """Features, or the entries, with one dimension for all memories."""
        source = self.entries if self.features is None else self.features
        return source if self.is_shared else map_tensors(lambda f: f.flatten(0, 1), source)

    def _every(self) -> Any:
        """Heads of all entries, computed once."""
        if self._heads is None:
            return self._flat()
        wanted = torch.is_grad_enabled()
        if self._all is None or (wanted and not self._all[0]):
            self._all = (wanted, self._heads(self._flat()))
        return self._all[1]

    def check(self, x: Tensor) -> None:
        """Refuse datapoints that do not fit this memory.

        Args:
            x: [B, *E].

        Raises:
            ValueError: another shape than the entries, another batch than the memories, NaN or infinity; images
                from 0 to 1 beside entries from 0 to 255.

        Warns:
            UserWarning: ink and paper changed places between x and the entries.
        """
        if x.dim() != self.event_dim + 1 or x.shape[1:] != self.entry_shape:
            raise ValueError(
                f"x: expected shape [B, {', '.join(map(str, self.entry_shape))}] like the memory's entries, "
                f"got {list(x.shape)}"
            )
        if not self.is_shared and len(x) != self.entries.shape[0]:
            raise ValueError(
                f"x: expected {self.entries.shape[0]} datapoints, one per memory, got {len(x)} "
                f"(memory {list(self.entries.shape)}, x {list(x.shape)})"
            )
        check_finite("x", x)
        if self.event_dim == 3 and self._first("like x") and check_alike(x, self.entries):
            self._seen.add("inverted")

    def check_values(self, likelihood: Any) -> None:
        """Refuse entries that a likelihood cannot score, unless they are learned; each kind looks once per memory.

        Args:
            likelihood: a `Likelihood`, whose `check` and `warn` look at the entries.

        Raises:
            ValueError: values that it cannot score.
        """
        # Not by identity: copies of a model are of one kind.
        made_with = vars(likelihood).get("made_with", {})
        kind = f"{type(likelihood).__module__}.{type(likelihood).__qualname__} {made_with}"
        if not (self.learned or self.entries.requires_grad) and self._first(f"entries of {kind}"):
            likelihood.check("memory.entries", self.entries)
            if "inverted" not in self._seen:  # which has been said
                likelihood.warn("memory.entries", self.entries)

    def _first(self, check: str) -> bool:
        """Whether the entries have not had this look at their values yet."""
        if not looks_at(check, self.entries) or check in self._seen:
            return False
        self._seen.add(check)
        return True


# What a copy of a memory does not take with it: encodings belong to networks, and their graphs cannot be copied.
NOT_ENCODED = dict.fromkeys(("features", "_left", "_held", "_heads", "_all", "_last"))


def _first_of(features: Any) -> Tensor:
    """The first tensor of a nested structure."""
    return features if isinstance(features, Tensor) else _first_of(next(iter(features)))


def _distinct(entries: Tensor) -> tuple[Tensor, Tensor | None]:
    """Each entry once, and for all N the one that it equals; None where fewer than a tenth are repeated.

    Memories of their own for many images have entries in common. Only on the CPU: a GPU would have to wait for
    their number.
    """
    if entries.device.type != "cpu":
        return entries, None
    rows = entries.detach().reshape(len(entries), -1)
    # Equal rows have equal sums (exactly, if binary); unequal ones are told apart below.
    weights = torch.randint(2**30, (rows.shape[1],), generator=torch.Generator().manual_seed(0)).double()
    _, inverse = (rows.double() @ weights).unique(return_inverse=True)
    count = int(inverse.max()) + 1
    if entries.requires_grad or count > 0.9 * len(rows):
        return entries, None
    first = torch.full((count,), len(rows)).scatter_reduce(0, inverse, torch.arange(len(rows)), "amin")
    if not torch.equal(rows[first][inverse], rows):
        return entries, None
    return entries[first], inverse


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tensor or a nested (named) tuple."""
    if isinstance(tree, Tensor):
        return function(tree)
    mapped = [map_tensors(function, leaf) for leaf in tree]
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
