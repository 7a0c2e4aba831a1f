"""A bank of very many entries whose keys are kept from update to update, old as they are."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro._system.at_rest import at_rest
from vma_pyro._system.processor import is_faster_in_bf16
from vma_pyro._system.ranks import Ranks
from vma_pyro._system.whole import check_whole
from vma_pyro.memory.encoder import Encoder
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.nearest import nearest

ENTRIES_PER_CHUNK = 2048  # encoded at a time
SHORTEST_WAIT = 10  # updates between refreshes at the start
LEAST_LIKENESS = 0.95  # of new keys and those kept, without making all anew
COUNTS = ("updates", "refreshed", "cursor", "likeness")
CENTRE_RATE = 0.3  # of the way to the mean of what an update encodes


class _Reference:
    """A weak reference that copies share; what is read from a file refers to nothing."""

    def __init__(self, to: Any = None) -> None:
        self.get = (lambda: None) if to is None else weakref.ref(to)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reference, ()


class KeyedBank:
    """Entries with the keys that networks in training made of them, some updates ago.

    An update looks for candidates by these keys, encodes what it has found, and hands the new keys back
    (`replace`); every `refresh_every` updates, at the start more often, all keys are made anew (`begin_update`).
    Old keys make a worse proposal, never a wrong bound. The bank belongs to what supplies the data: its state goes
    into the checkpoint with theirs (`state_dict`), so that a resumed run finds the very keys that it left.

    Args:
        entries: images [N, 1, 28, 28] or what else networks encode; binary ones may be bytes, [N, *E].
        labels: class of each entry, int64 [N].
        refresh_every: R, most updates between two times that all keys are made anew. They are nearer at the start,
            where weights change fastest: at most an eighth of the updates so far; and wherever new keys are found
            to differ from those kept.
        key_dtype: of the keys that are kept: float32, or bfloat16, half the memory and three digits; None:
            bfloat16 where the processor is faster in it, which searches in half the time.
        event_dim: number of dimensions of one entry.

    Attributes:
        memory: of all entries.
        keys: what the similarity compares with a query [N, E], after `embed`; None before the first update.
        centre: mean key of the entries [E], by which queries and new keys are embedded: at the last refresh, and
            then as it moves with what is encoded. (All keys may drift together by as much as they differ.)
        updates: begun so far.
        refreshed: `updates` at the last refresh.
        likeness: mean cosine of the keys of the last update with those that they have replaced.
        cursor: where `BankMemory` goes on to fill its candidates up.

    Raises:
        ValueError: no whole number of updates between refreshes, another type of keys; see `Memory`.
    """

    def __init__(
        self,
        entries: Tensor,
        labels: Int[Tensor, " N"] | None = None,
        *,
        refresh_every: int = 500,
        key_dtype: torch.dtype | None = None,
        event_dim: int = 3,
    ) -> None:
        check_whole("refresh_every", refresh_every)
        if key_dtype is None:
            key_dtype = torch.bfloat16 if is_faster_in_bf16(entries.device) else torch.float32
        if key_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"key_dtype: expected torch.float32 or torch.bfloat16, got {key_dtype}")
        self.memory = Memory(entries, labels, event_dim)
        if not self.memory.is_shared:
            raise ValueError(f"entries: expected one bank [N, *E], got shape {list(entries.shape)}")
        self.refresh_every, self.key_dtype = refresh_every, key_dtype
        self.keys: Tensor | None = None
        self.centre: Tensor | None = None
        self.updates = self.refreshed = self.cursor = 0
        self.likeness = 1.0
        self._trained: _Reference | None = None  # to the networks that the keys are of

    def __len__(self) -> int:
        """Number of entries."""
        return self.memory.size

    def move(self, device: torch.device | str) -> None:
        """Take entries and keys to a device, once."""
        self.memory = self.memory.to(device)
        if self.keys is not None and self.centre is not None:
            self.keys, self.centre = self.keys.to(device), self.centre.to(device)

    def begin_update(self, networks: Encoder, similarity: Any) -> None:
        """Make all keys anew if they are due, or of other networks.

        Raises:
            ValueError: several processes, whose keys would differ.
        """
        if (size := Ranks.present().size) > 1:
            raise ValueError(f"memory: expected one process for a bank with keys, got {size}")
        wait = min(self.refresh_every, max(SHORTEST_WAIT, self.updates // 8))
        # A target that is not found for once may cost so much that the next step moves all keys, and many more are
        # not found: until the keys are made anew, the networks would unlearn what they know.
        wait = wait if self.likeness > LEAST_LIKENESS else SHORTEST_WAIT
        others = self._trained is not None and not self.is_trained_with(networks)
        if others or self.keys is None or self.updates == 0 or self.updates - self.refreshed >= wait:
            self.keys, self.centre = self.keys_by(networks, similarity)
            self.refreshed, self.likeness = self.updates, 1.0
        self.updates += 1
        self._trained = _Reference(networks)

    def is_trained_with(self, networks: Encoder) -> bool:
        """Whether the keys kept are those of these networks, at most `refresh_every` updates old."""
        return self._trained is not None and self._trained.get() is networks

    @torch.no_grad()
    def keys_by(self, networks: Encoder, similarity: Any) -> tuple[Float[Tensor, "N E"], Float[Tensor, " E"]]:
        """What networks make of all entries now: keys as the similarity compares them, and their mean."""
        parts = []
        with at_rest(networks):
            for rows in torch.arange(len(self), device=self.memory.device).split(ENTRIES_PER_CHUNK):
                features: Any = networks.encode(self.entries_at(rows))
                parts.append(features.key)
        keys = _in_32_bits(torch.cat(parts))
        centre = keys.mean(0)
        return similarity.embed(keys, centre).to(self.key_dtype), centre

    @torch.no_grad()
    def replace(self, rows: Int[Tensor, " P"], keys: Float[Tensor, "P E"], similarity: Any) -> None:
        """Put new keys in the place of old ones."""
        assert self.keys is not None
        assert self.centre is not None
        keys = _in_32_bits(keys.detach())
        self.centre = self.centre.to(keys.dtype).lerp(keys.mean(0), CENTRE_RATE)
        new = similarity.embed(keys, self.centre)
        self.likeness = float(F.cosine_similarity(new, self.keys[rows].to(new.dtype)).mean())
        self.keys[rows] = new.to(self.key_dtype)

    @torch.no_grad()
    def nearest(
        self,
        query: Float[Tensor, "B E"],
        number: int,
        networks: Encoder,
        similarity: Any,
        *,
        rows: Int[Tensor, " S"] | None = None,
        left_out: Int[Tensor, " B"] | None = None,
    ) -> Int[Tensor, "B number"]:
        """The entries whose keys are most similar to each query, best first.

        By the keys that are kept, if these networks have made them, else by new ones, which are not kept.

        Args:
            query: keys of targets.
            number: entries for each.
            networks: that made the query.
            similarity: with `embed`.
            rows: entries of the bank to choose from; None: all. What is returned counts through them.
            left_out: one for each query that is not to be found, counted likewise.
        """
        keys, centre = self.keys, self.centre
        if keys is None or centre is None or not self.is_trained_with(networks):
            keys, centre = self.keys_by(networks, similarity)
        if rows is not None:
            keys = keys.index_select(0, rows)
        return nearest(similarity.embed(query, centre), keys, number, left_out=left_out)

    def entries_at(self, rows: Int[Tensor, " P"]) -> Tensor:
        """Entries as networks take them [P, *E], in 32 bits or more."""
        return self.memory.entries.index_select(0, rows).to(self.memory.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Keys, and what says when they are due, as tensors and numbers."""
        kept = None if self.keys is None else {"keys": self.keys.clone(), "centre": self.centre}
        return {"kept": kept, **{name: getattr(self, name) for name in COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: keys of another number of entries, or of another type.
        """
        kept = state["kept"]
        self.keys = self.centre = None
        if kept is not None:
            if len(kept["keys"]) != len(self):
                raise ValueError(f"keys: expected {len(self)}, one for each entry, got {len(kept['keys'])}")
            # What was made on a processor with bfloat16 is of that type: a run goes on as it began.
            self.keys, self.centre = (kept[name].to(self.memory.device).clone() for name in ("keys", "centre"))
            self.key_dtype = self.keys.dtype
        for name in COUNTS:
            setattr(self, name, state[name])


def _in_32_bits(keys: Tensor) -> Tensor:
    """Keys as they are compared, in 32 bits or more, whatever networks compute in."""
    return keys.to(torch.promote_types(keys.dtype, torch.float32))
