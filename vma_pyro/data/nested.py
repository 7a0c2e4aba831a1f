"""Episodes for tests: the same targets under memories that grow, each containing the smaller ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.data.episodes import Episode
from vma_pyro.data.ragged import Counted, present
from vma_pyro.data.records import ImageClasses
from vma_pyro.data.workers import take_turns
from vma_pyro.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

MOST_BYTES = 80_000 * 28 * 28 * 4  # of the memories of one part


class NestedEpisodes:
    """Holds fixed targets, each with a memory of its own of any number of classes and examples.

    Where the memories have more entries in all than there are images, they are selected from one bank of all of
    these, which `vma_pyro.evaluation.encoded` encodes once for a stream, and `encoded_bank` for all.

    In the workers of a `DataLoader` each has episodes of its own; together they have all targets once.

    Everything about target i depends on the seed and i alone, so that figures for different memories are paired by
    target: the memory of more classes, or of more examples, contains that of fewer. Where its own class stands
    among those of the memory is random.

    A class with fewer examples than are asked for gives all that it has (of the target's own, all others): the
    memory has a mask then. A class with a single example has no target.

    Args:
        characters: images with classes.
        images: at most so many targets, drawn without replacement from all images; None takes every image once.
        seed: of everything.
        within_alphabet: whether the other classes come from the target's alphabet only; targets then come from
            alphabets of at least `smallest_alphabet` classes.
        smallest_alphabet: see there.

    Raises:
        ValueError: no target is wanted, or no alphabet is large enough.
    """

    def __init__(
        self,
        characters: ImageClasses,
        *,
        images: int | None,
        seed: int,
        within_alphabet: bool = False,
        smallest_alphabet: int = 1,
    ) -> None:
        self.pixels, self.as_float = torch.from_numpy(np.ascontiguousarray(characters.pixels)), characters.as_float
        self.counted = Counted.of(torch.as_tensor(characters.counts))
        self.seed = seed
        self._bank: Memory | None = None
        names = np.array(characters.groups)
        everything = np.arange(len(names))
        self._others = [np.flatnonzero(names == name) if within_alphabet else everything for name in names]
        smallest = max(2, smallest_alphabet) if within_alphabet else 1
        large = np.array([len(others) >= smallest for others in self._others])
        several = self.counted.number > 1
        of_class = torch.arange(len(names)).repeat_interleave(self.counted.number)  # of each image
        possible = torch.nonzero((torch.from_numpy(large) & several)[of_class])[:, 0]
        available = len(possible)
        if not several.any():
            raise ValueError("characters: expected a class with 2 examples or more, as a target is in no memory")
        if images is not None:
            check_whole("images", images)
        if not available:
            most = max(map(len, self._others))
            if most < 2:
                raise ValueError(
                    "within_alphabet: expected groups (alphabets) of 2 classes or more, got groups of one each"
                )
            raise ValueError(
                f"smallest_alphabet: expected at most {most}, the largest there is, got {smallest_alphabet}"
            )
        drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:images]
        self._row = possible[drawn]
        self._class = of_class[self._row]
        self._example = self._row - self.counted.first[self._class]

    def __len__(self) -> int:
        """Count the targets."""
        return len(self._class)

    def bank(self) -> Memory:
        """Return all images as one memory."""
        return Memory(self.as_float(self.pixels))

    def selecting_from(self, bank: Memory) -> NestedEpisodes:
        """Return the same episodes with all memories selected from a bank, as `bank` gives it or encoded."""
        found = copy.copy(self)
        found._bank = bank
        return found

    @property
    def examples(self) -> int:
        """Count the examples of the largest class, the target among them."""
        return self.counted.most

    def episodes(self, classes: int, shots: int, *, first: int | None = None) -> Iterator[Episode]:
        """Yield all targets, some at a time, each under the target's class and `classes` - 1 others.

        Args:
            classes: of the memory.
            shots: examples of each of them, or all that there are; never the target.
            first: only so many targets.

        Raises:
            ValueError: more classes or shots than there are.
        """
        check_whole("classes", classes)
        check_whole("shots", shots, least=0)
        if not 1 <= shots < self.examples:
            raise ValueError(f"shots: expected 1 to {self.examples - 1}, got {shots}")
        read = self._reader(first, classes * shots)
        for part in self._parts(first, classes * shots):
            chosen = [self._memory(i, classes) for i in part]
            labels = torch.stack([label for _, label, _ in chosen])
            rows = torch.stack([rows for rows, _, _ in chosen])  # [b, classes]
            order = torch.stack([order[:, :shots] for _, _, order in chosen])  # [b, classes, shots]
            names = torch.arange(classes).repeat_interleave(shots).expand(len(part), -1)
            number = self.counted.number[rows]
            number[torch.arange(len(part)), labels] -= 1  # the target is the last of its class
            memory = read(self.counted.rows(rows, order).flatten(1, 2), names, present(number, shots))
            yield Episode(memory, self._targets(part), labels)

    def pooled(
        self, classes: int, entries: int, *, replacement: bool = False, first: int | None = None
    ) -> Iterator[Episode]:
        """Yield all targets, each under `entries` images in all, drawn from the images of its class and of others.

        The conditioning sets of Generative Matching Networks (Bartunov & Vetrov 2016): "shots" are a total, and
        the target's class may be absent. Their public sampler draws with replacement, the target included.

        Args:
            classes: from whose images the entries are drawn.
            entries: |M|.
            replacement: draw with replacement, from the target as well; else without, and never the target.
            first: only so many targets.

        Raises:
            ValueError: more entries than the classes have.
        """
        check_whole("classes", classes)
        check_whole("entries", entries, least=0)
        most = int(self.counted.number.sort().values[:classes].sum()) - 1
        if entries < 1 or (entries > most and not replacement):
            raise ValueError(f"entries: expected 1 to {most}, the images of {classes} classes, got {entries}")
        read = self._reader(first, entries)
        for part in self._parts(first, entries):
            chosen, labels = [], []
            for i in part:
                rows, label, order = self._memory(i, classes)
                # The target may be the last of its class, and nowhere else; what a class has not is left out.
                there = torch.arange(self.examples) < self.counted.number[rows][:, None]
                pool = self.counted.rows(rows, order)[there]
                own = int(self._row[i])
                generator = self._generator(i, 1)
                if replacement:
                    picked = pool[torch.randint(len(pool), (entries,), generator=generator)]
                else:
                    pool = pool[pool != own]
                    picked = pool[torch.randperm(len(pool), generator=generator)[:entries]]
                chosen.append(picked)
                labels.append(label)
            yield Episode(read(torch.stack(chosen), None, None), self._targets(part), torch.stack(labels))

    def _reader(self, first: int | None, size: int) -> Callable[[Tensor, Tensor | None, Tensor | None], Memory]:
        """Make memories of numbered entries, of a bank if they have more in all than there are images."""

        def plain(rows: Tensor, labels: Tensor | None, mask: Tensor | None) -> Memory:
            return Memory(self.as_float(self.pixels[rows]), labels, mask=mask)

        if self._bank is None and self._number(first) * size <= len(self.pixels):
            return plain
        bank = self.bank() if self._bank is None else self._bank

        def selected(rows: Tensor, labels: Tensor | None, mask: Tensor | None) -> Memory:
            return SelectedMemory(bank, rows, labels) if mask is None else plain(rows, labels, mask)

        return selected

    def _number(self, first: int | None) -> int:
        return len(self) if first is None else min(first, len(self))

    def _parts(self, first: int | None, size: int) -> Iterator[range]:
        """Yield targets whose memories fit together into a quarter of a gigabyte."""
        number = self._number(first)
        step = max(1, min(256, MOST_BYTES // (4 * math.prod(self.pixels.shape[1:]) * size)))
        for start in take_turns(range(0, number, step)):
            yield range(start, min(start + step, number))

    def _memory(self, i: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw target i's classes [C], the place of its own among them, and orders of their examples [C, E]."""
        own = int(self._class[i])
        pool = torch.from_numpy(self._others[own])
        if not 1 <= classes <= len(pool):
            raise ValueError(f"classes: expected 1 to {len(pool)}, those to choose from, got {classes}")
        generator = self._generator(i, 0)
        pool = pool[pool != own]
        pool = pool[torch.randperm(len(pool), generator=generator)]
        noise = torch.rand(len(pool) + 1, self.examples, generator=generator)
        noise[0, self._example[i]] = 2.0  # the target is the last of its class
        rows = torch.cat([self._class[i : i + 1], pool[: classes - 1]])
        order = self.counted.orders(rows, noise[:classes])
        place = torch.randint(classes, (), generator=self._generator(i, 2 + classes))
        swapped = torch.arange(classes)
        swapped[0], swapped[place] = place, 0
        return rows[swapped], place, order[swapped]

    def _targets(self, part: range) -> Tensor:
        return self.as_float(self.pixels[self._row[part.start : part.stop]])

    def _generator(self, i: int, stream: int) -> torch.Generator:
        # Seeds that differ by little give unrelated streams (Mersenne Twister after torch's own scrambling).
        return torch.Generator().manual_seed((self.seed * 1_000_003 + i) * 4_001 + stream)
