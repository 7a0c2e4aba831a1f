"""Classes with different numbers of examples: random orders of them, and which places of an order are taken."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Counted(NamedTuple):
    """Says which rows of a record belong to its classes.

    Attributes:
        first: row of the first image of each class, int64 [classes].
        number: images of each class, int64 [classes].
    """

    first: Tensor
    number: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> Counted:
        """From the number of images of each class."""
        return cls(counts.cumsum(0) - counts, counts)

    @property
    def most(self) -> int:
        """Images of the largest class."""
        return int(self.number.max())

    @property
    def is_even(self) -> bool:
        """Whether all classes have the same number of images."""
        return bool((self.number == self.number[0]).all())

    def orders(self, classes: Tensor, noise: Tensor) -> Tensor:
        """Random orders of the images of each class, [..., most]: places beyond its number come last.

        Args:
            classes: numbers of classes [...].
            noise: independent uniform numbers [..., most].
        """
        if self.is_even:
            return noise.argsort(-1)
        absent = torch.arange(self.most) >= self.number[classes].unsqueeze(-1)
        return noise.masked_fill(absent, 9.0).argsort(-1)

    def in_memory(self, classes: Tensor, shots: int) -> Tensor:
        """Examples that go into a memory: `shots`, or all but one where there are fewer; one of a single one."""
        return (self.number[classes] - 1).clamp(min=1, max=shots)

    def rows(self, classes: Tensor, order: Tensor) -> Tensor:
        """Rows of the images at these places of the classes' orders [..., n]; of an absent one, any."""
        return self.first[classes].unsqueeze(-1) + torch.minimum(order, self.number[classes].unsqueeze(-1) - 1)


def present(taken: Tensor, shots: int) -> Tensor | None:
    """The mask of a memory with `shots` places for each class [..., classes] of which so many are taken.

    Returns:
        Boolean [..., classes * shots]; None where all are taken.
    """
    mask = torch.arange(shots) < taken.unsqueeze(-1)
    return None if bool(mask.all()) else mask.flatten(-2)
