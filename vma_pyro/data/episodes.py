"""Few-shot episodes: a memory of some classes and queries from the same classes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from vma_pyro._system.whole import check_whole
from vma_pyro.data.records import Characters
from vma_pyro.data.workers import Stream
from vma_pyro.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

Augmentation = Literal["rotations", "rotations+flips"]


class Episode(NamedTuple):
    """Holds one episode.

    Attributes:
        memory: entries [S, 1, 28, 28], or [B, S, 1, 28, 28] with one memory per query, S = classes * shots, and
            their labels in 0..classes-1.
        x: queries, float {0, 1} [B, 1, 28, 28]; none of them is in its own memory.
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

    Args:
        dataset: characters [classes, examples, 28, 28].
        classes: classes per memory.
        shots: examples of each class in the memory.
        queries: B, queries per episode.
        seed: of the stream.
        shared_memory: True: one memory serves all queries (fast; the queries are distinct images of its
            classes). False: each query has its own memory, as in the paper.
        augment: None, or "rotations" / "rotations+flips", which turn each class into 4 / 8 classes. It changes the
            task: report figures without it.

    Raises:
        ValueError: more classes, shots or queries than the data set has.

    Example::

        for episode in EpisodeSampler(glyphs.load(), classes=8, shots=4, queries=64, seed=0):
            ...
    """

    def __init__(
        self,
        dataset: Characters,
        *,
        classes: int = 8,
        shots: int = 4,
        queries: int = 64,
        seed: int,
        shared_memory: bool = True,
        augment: Augmentation | None = None,
    ) -> None:
        images = augmented(dataset.images, augment)
        available, examples = images.shape[:2]
        for name, value in (("classes", classes), ("shots", shots), ("queries", queries)):
            check_whole(name, value)
        if classes > available:
            raise ValueError(f"classes: expected at most {available}, the classes of the data set, got {classes}")
        if shots >= examples:
            raise ValueError(
                f"shots: expected at most {examples - 1}, as each class has {examples} examples and one must be "
                f"left for the queries, got {shots}"
            )
        if shared_memory and queries > classes * (examples - shots):
            raise ValueError(
                f"queries: expected at most {classes * (examples - shots)}, the examples that {classes} classes "
                f"leave beside {shots} shots, got {queries}"
            )
        super().__init__(seed)
        self.images = torch.from_numpy(images)
        self.classes, self.shots, self.queries = classes, shots, queries
        self.shared_memory = shared_memory

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw classes, orders of their examples, and queries."""
        b, c, s = self.queries, self.classes, self.shots
        if self.shared_memory:
            chosen = torch.randperm(len(self.images), generator=self._generator)[:c]
            order = self._random_orders(c)  # [c, examples]
            left = c * (order.shape[1] - s)
            return chosen, order, torch.randperm(left, generator=self._generator)[:b]
        # The c largest of independent uniform numbers are c classes without replacement, in random order.
        chosen = torch.rand(b, len(self.images), generator=self._generator).topk(c).indices  # [b, c]
        order = self._random_orders(b * c).reshape(b, c, -1)
        return chosen, order, torch.randint(c, (b,), generator=self._generator)

    def _episode(self, *drawn: Tensor) -> Episode:
        return self._shared(*drawn) if self.shared_memory else self._per_query(*drawn)

    def _shared(self, chosen: Tensor, order: Tensor, queries: Tensor) -> Episode:
        """Assemble classes [c], orders of their examples [c, examples] and queries [b] among those left."""
        c, s = self.classes, self.shots
        memory = self.images[chosen[:, None], order[:, :s]]  # [c, s, 28, 28]
        left = order[:, s:]
        labels = queries // left.shape[1]
        x = self.images[chosen[labels], left.flatten()[queries]]
        memory_labels = torch.arange(c).repeat_interleave(s)
        return Episode(Memory(as_images(memory.flatten(0, 1)), memory_labels), as_images(x), labels)

    def _per_query(self, chosen: Tensor, order: Tensor, labels: Tensor) -> Episode:
        """Assemble classes [b, c], orders of their examples [b, c, examples] and labels [b], places of classes."""
        b, c, s = self.queries, self.classes, self.shots
        rows = (chosen[:, :, None] * order.shape[2] + order[:, :, :s]).flatten(1, 2)  # [b, c s]
        each = torch.arange(b)
        # Targets come from the other end of the order: under one seed the memories of more shots contain those
        # of fewer, and all numbers of shots have the same targets.
        x = self.images[chosen[each, labels], order[each, labels, -1]]
        memory_labels = torch.arange(c).repeat_interleave(s).expand(b, -1)
        # Memories of the same few classes have entries in common: each is there, and encoded, once.
        used, rows = rows.unique(return_inverse=True)
        memory = SelectedMemory(Memory(as_images(self.images.flatten(0, 1)[used])), rows, memory_labels)
        return Episode(memory, as_images(x), labels)

    def _random_orders(self, rows: int) -> Tensor:
        """Draw independent random orders of the examples [rows, examples]."""
        return torch.rand(rows, self.images.shape[1], generator=self._generator).argsort(dim=1)


def augmented(images: np.ndarray, augment: Augmentation | None) -> np.ndarray:
    """Add rotated (and mirrored) classes as classes of their own: [classes * {1, 4, 8}, examples, 28, 28]."""
    if augment is None:
        return np.ascontiguousarray(images)
    if augment not in ("rotations", "rotations+flips"):
        raise ValueError(f"augment: expected None, 'rotations' or 'rotations+flips', got {augment!r}")
    turned = [np.rot90(images, turns, axes=(-2, -1)) for turns in range(4)]
    if augment == "rotations+flips":
        turned += [np.flip(image, axis=-1) for image in turned]
    return np.concatenate(turned)


def as_images(binary: Tensor) -> Tensor:
    """Convert uint8 [..., 28, 28] to float [..., 1, 28, 28]."""
    return binary.float().unsqueeze(-3)
