"""Few-shot episodes: a memory of some classes and queries from the same classes."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from vma_pyro._system.whole import check_whole
from vma_pyro.data.ragged import Counted, present
from vma_pyro.data.records import ImageClasses
from vma_pyro.data.workers import Stream
from vma_pyro.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

Augmentation = Literal["rotations", "rotations+flips"]


class Episode(NamedTuple):
    """Holds one episode.

    Attributes:
        memory: entries [S, C, height, width], or [B, S, C, height, width] with one memory per query, S = classes *
            shots, and their labels in 0..classes-1; with a mask where a class has fewer examples.
        x: queries, float32 from 0 to 1 [B, C, height, width]; none of them is in its own memory.
        labels: class of each query within the episode, int64 [B].
    """

    memory: Memory
    x: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Episode:
        """Move the episode to another device."""
        return Episode(self.memory.to(device), self.x.to(device), self.labels.to(device))


class Episodes(Protocol):
    """Streams episodes without end; its position can be saved."""

    def sample(self) -> Episode:
        """Draw the next episode."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, as tensors only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""


def _refuse_to_collate(batch: Any, *, collate_fn_map: Any = None) -> Any:
    raise ValueError(
        f"batch_size: expected None, as an episode is a batch already, got {len(batch)} episodes to put together; "
        "use DataLoader(stream, batch_size=None)"
    )


default_collate_fn_map[Memory] = _refuse_to_collate  # torch's own way to tell `DataLoader` of a type


class EpisodeSampler(Stream):
    """Draws episodes without end, reproducibly; memory and queries are drawn without replacement.

    In the workers of a `DataLoader` (with `batch_size=None`) it is the same stream, see `Stream`.

    Classes may have different numbers of examples. One with `shots` or fewer lends all but one to the memory, so
    that the others are queries; one with a single example is an entry at times, and never a query. The memory has
    a mask then.

    Args:
        dataset: images with classes.
        classes: classes per memory.
        shots: examples of each class in the memory, at most.
        queries: B, queries per episode.
        seed: of the stream.
        shared_memory: True: one memory serves all queries (fast; the queries are distinct images of its
            classes, but for classes that leave fewer than `queries` in all). False: each query has its own memory,
            as in the paper.
        augment: None, or "rotations" / "rotations+flips", which turn each class into 4 / 8 classes; for square
            images. It changes the task: report figures without it.
        blank: share of the episodes whose entries are all without ink, so that a model learns what it knows of an
            image without a memory: p(x) is then p(x | M) of a single blank entry, and the same networks give both.

    Raises:
        ValueError: more classes, shots or queries than the data set has, images that cannot be turned, a share
            outside [0, 1).

    Example::

        for episode in EpisodeSampler(glyphs.load(), classes=8, shots=4, queries=64, seed=0):
            ...
    """

    def __init__(
        self,
        dataset: ImageClasses,
        *,
        classes: int = 8,
        shots: int = 4,
        queries: int = 64,
        seed: int,
        shared_memory: bool = True,
        augment: Augmentation | None = None,
        blank: float = 0.0,
    ) -> None:
        if not isinstance(blank, int | float) or not 0 <= blank < 1:
            raise ValueError(f"blank: expected a share from 0 to below 1, got {blank}")
        counts = np.tile(dataset.counts, TURNS.get(augment, 1))
        available, examples = len(counts), dataset.examples
        for name, value in (("classes", classes), ("shots", shots), ("queries", queries)):
            check_whole(name, value)
        if classes > available:
            raise ValueError(f"classes: expected at most {available}, the classes of the data set, got {classes}")
        if shots >= examples:
            has = "each class has" if dataset.counts.min() == examples else "the largest class has"
            raise ValueError(
                f"shots: expected at most {examples - 1}, as {has} {examples} examples and one must be "
                f"left for the queries, got {shots}"
            )
        pixels = augmented(dataset, augment)
        self.counted = Counted.of(torch.from_numpy(counts))
        left = self._left(torch.arange(available), shots)
        most = most_queries(self.counted.number, classes, shots)
        if shared_memory and queries > most:
            raise ValueError(
                f"queries: expected at most {most}, the examples that {classes} classes "
                f"leave beside {shots} shots, got {queries}"
            )
        super().__init__(seed)
        self.pixels, self.as_float = pixels, dataset.as_float
        self.classes, self.shots, self.queries = classes, shots, queries
        self.shared_memory, self.blank = shared_memory, blank
        self._has_queries = left > 0

    def _left(self, classes: Tensor, shots: int) -> Tensor:
        """Examples that are not in the memory."""
        return self.counted.number[classes] - self.counted.in_memory(classes, shots)

    def _drawn(self) -> tuple[Tensor, ...]:
        """Draw classes, orders of their examples, and queries; and whether the memory is blank, if it may be."""
        drawn = self._drawn_with_ink()
        return (*drawn, torch.rand((), generator=self._generator) < self.blank) if self.blank else drawn

    def _drawn_with_ink(self) -> tuple[Tensor, Tensor, Tensor]:
        b, c, s = self.queries, self.classes, self.shots
        available = len(self._has_queries)
        if self.shared_memory:
            chosen = torch.randperm(available, generator=self._generator)
            if not self._has_queries[chosen[:c]].any():  # single examples all of them
                chosen[0] = chosen[self._has_queries[chosen]][0]
            chosen = chosen[:c]
            order = self.counted.orders(chosen, self._noise(c))  # [c, examples]
            left = int(self._left(chosen, s).sum())
            queries = torch.randperm(left, generator=self._generator)
            return chosen, order, queries.repeat(-(-b // left))[:b]
        # The c largest of independent uniform numbers are c classes without replacement, in random order.
        score = torch.rand(b, available, generator=self._generator)
        chosen = score.topk(c).indices  # [b, c]
        noise = self._noise(b, c)
        labels = torch.randint(c, (b,), generator=self._generator)
        if not self._has_queries.all():
            chosen, labels = self._with_queries(chosen, labels, score)
        return chosen, self.counted.orders(chosen, noise), labels

    def _with_queries(self, chosen: Tensor, labels: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Move labels [b] to the next chosen class [b, c] that has queries, and see to it that there is one."""
        each = torch.arange(len(chosen))
        none = ~self._has_queries[chosen].any(1)
        best = score.masked_fill(~self._has_queries, -1.0).argmax(1)
        chosen[each[none], labels[none]] = best[none]
        turn = (labels[:, None] + torch.arange(chosen.shape[1])) % chosen.shape[1]
        steps = self._has_queries[chosen.gather(1, turn)].int().argmax(1)
        return chosen, (labels + steps) % chosen.shape[1]

    def _episode(self, chosen: Tensor, order: Tensor, queries: Tensor, *blank: Tensor) -> Episode:
        drawn = (chosen, order, queries)
        episode = self._shared(*drawn) if self.shared_memory else self._per_query(*drawn)
        if not any(blank):
            return episode
        memory = episode.memory  # of the same shape: updates are recorded for one
        entries = torch.zeros_like(memory.entries)
        return episode._replace(memory=Memory(entries, memory.labels, mask=memory.mask))

    def _shared(self, chosen: Tensor, order: Tensor, queries: Tensor) -> Episode:
        """Assemble classes [c], orders of their examples [c, examples] and queries [b] among those left."""
        s = self.shots
        taken, left = self.counted.in_memory(chosen, s), self._left(chosen, s)
        # Of all examples that are left, class by class, the query says the number.
        ends = left.cumsum(0)
        labels = torch.searchsorted(ends, queries, right=True)
        place = taken[labels] + queries - (ends - left)[labels]
        x = self.counted.rows(chosen[labels], order[labels, place][:, None])[:, 0]
        memory = self.counted.rows(chosen, order[:, :s]).flatten()
        memory_labels = torch.arange(self.classes).repeat_interleave(s)
        mask = present(taken, s)
        return Episode(Memory(self._images(memory), memory_labels, mask=mask), self._images(x), labels)

    def _per_query(self, chosen: Tensor, order: Tensor, labels: Tensor) -> Episode:
        """Assemble classes [b, c], orders of their examples [b, c, examples] and labels [b], places of classes."""
        b, c, s = self.queries, self.classes, self.shots
        rows = self.counted.rows(chosen, order[:, :, :s]).flatten(1, 2)  # [b, c s]
        each = torch.arange(b)
        # Targets come from the other end of the order: under one seed the memories of more shots contain those
        # of fewer, and all numbers of shots have the same targets.
        own = chosen[each, labels]
        last = order[each, labels, self.counted.number[own] - 1]
        x = self._images(self.counted.first[own] + last)
        memory_labels = torch.arange(c).repeat_interleave(s).expand(b, -1)
        mask = present(self.counted.in_memory(chosen, s), s)
        if mask is not None:
            return Episode(Memory(self._images(rows), memory_labels, mask=mask), x, labels)
        # Memories of the same few classes have entries in common: each is there, and encoded, once.
        used, rows = rows.unique(return_inverse=True)
        return Episode(SelectedMemory(Memory(self._images(used)), rows, memory_labels), x, labels)

    def _images(self, rows: Tensor) -> Tensor:
        return self.as_float(self.pixels[rows])

    def _noise(self, *lead: int) -> Tensor:
        """Draw what makes random orders of the examples [*lead, examples]."""
        total = math.prod(lead)
        return torch.rand(total, self.counted.most, generator=self._generator).unflatten(0, lead)


def most_queries(counts: Tensor, classes: int, shots: int) -> int:
    """Images that the largest classes leave for queries beside a memory of so many classes and shots."""
    left = counts - (counts - 1).clamp(min=1, max=shots)
    return int(left.topk(min(classes, len(left))).values.sum())


TURNS: dict[Any, int] = {None: 1, "rotations": 4, "rotations+flips": 8}  # classes that one class becomes


def augmented(dataset: ImageClasses, augment: Augmentation | None) -> Tensor:
    """The pixels of a record, and of its turned (and mirrored) classes as classes of their own.

    Returns:
        Of the record's type, [N * {1, 4, 8}, C, height, width].
    """
    if augment not in TURNS:
        raise ValueError(f"augment: expected None, 'rotations' or 'rotations+flips', got {augment!r}")
    _, height, width = dataset.image_shape
    if augment is not None and height != width:
        raise ValueError(
            f"augment: expected None for images that are not square, {height} x {width}, got {augment!r}"
        )
    turned = [dataset.turned(turns) for turns in range(4 if augment else 1)]
    if augment == "rotations+flips":
        turned += [dataset.turned(turns, mirrored=True) for turns in range(4)]
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(turned) if augment else turned[0]))


def as_images(binary: Tensor) -> Tensor:
    """Convert uint8 [..., 28, 28] to float [..., 1, 28, 28]."""
    return binary.float().unsqueeze(-3)
