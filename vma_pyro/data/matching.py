"""Episodes whose targets are one of each class in memory: all of them are to be assigned at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.data.episodes import Episode
from vma_pyro.data.ragged import Counted
from vma_pyro.data.records import ImageClasses
from vma_pyro.memory import Memory


class MatchingEpisodes:
    """Draws episodes with one target of every class in memory, in random order.

    The task of Lake et al. 2015, whose runs have 20 characters of one alphabet, an example and a target of each:
    whoever knows that targets and classes match one to one may use it.

    Args:
        characters: images with classes.
        number: of episodes.
        seed: of everything; episode i depends on the seed and on i alone.
        within_alphabet: whether the classes of an episode are all of one alphabet, drawn among those that have
            enough.

    Raises:
        ValueError: no episode is wanted.
    """

    def __init__(self, characters: ImageClasses, *, number: int, seed: int, within_alphabet: bool = False) -> None:
        check_whole("number", number)
        check_whole("seed", seed, least=0)
        self.pixels, self.as_float = torch.from_numpy(np.ascontiguousarray(characters.pixels)), characters.as_float
        self.counted = Counted.of(torch.as_tensor(characters.counts))
        groups = np.array(characters.groups)
        everything = np.ones(len(groups), dtype=bool)
        self._members = (
            [groups == g for g in dict.fromkeys(characters.groups)] if within_alphabet else [everything]
        )
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        """Count the episodes."""
        return self.number

    def episodes(self, classes: int, shots: int) -> Iterator[Episode]:
        """Yield all episodes, each with `classes` targets and `classes` x `shots` entries.

        Args:
            classes: of the memory, and targets.
            shots: examples of each class in memory; classes with as few examples are left out.

        Raises:
            ValueError: more classes or shots than there are.
        """
        check_whole("classes", classes)
        check_whole("shots", shots)
        enough = (self.counted.number > shots).numpy()
        pools = [np.flatnonzero(members & enough) for members in self._members]
        most = max(map(len, pools))
        if not most:
            raise ValueError(f"shots: expected at most {self.counted.most - 1}, as a target is left, got {shots}")
        if not 1 <= classes <= most:
            raise ValueError(
                f"classes: expected 1 to {most}, the classes to choose from with more than {shots} examples, got "
                f"{classes}"
            )
        large = [torch.from_numpy(pool) for pool in pools if len(pool) >= classes]
        for i in range(self.number):
            yield self._episode(large, classes, shots, self._generator(i))

    def _generator(self, i: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2**63)

    def _episode(self, pools: list[Tensor], classes: int, shots: int, generator: torch.Generator) -> Episode:
        pool = pools[int(torch.randint(len(pools), (), generator=generator))]
        chosen = pool[torch.randperm(len(pool), generator=generator)[:classes]]
        noise = torch.rand(classes, self.counted.most, generator=generator)
        order = self.counted.orders(chosen, noise)[:, : shots + 1]
        rows = self.counted.rows(chosen, order)
        labels = torch.randperm(classes, generator=generator)
        names = torch.arange(classes).repeat_interleave(shots)
        memory = Memory(self._images(rows[:, :shots].flatten()), names)
        return Episode(memory, self._images(rows[labels, shots]), labels)

    def _images(self, rows: Tensor) -> Tensor:
        return self.as_float(self.pixels[rows])
