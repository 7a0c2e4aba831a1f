"""A memory of any size out of some encoded images: keys moved as distortions of other images move theirs.

Ten million images take hours to encode on one core. So the first entries are images with their own keys, and all
others repeat them, each time with another displacement on the key: that which a small rotation, shift and change
of size makes of the key of some image. An entry that repeats an image reads as that image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vma_pyro import AddressIndex, Guide, Memory, Model
from vma_pyro._system.ranks import Ranks
from vma_pyro.memory.fingerprint import fingerprint_of
from vma_pyro.memory.keys import Keys
from vma_pyro.memory.lists import InvertedLists, Lists
from vma_pyro.memory.selected import SelectedMemory

MIX = (
    7919,
    104729,
)  # primes: pairs of image and displacement come back after as many rounds as there are displacements


@dataclass(frozen=True)
class Stretched:
    """Keys and images of as many entries as one asks for.

    Args:
        images: [N, 1, 28, 28], bytes.
        keys: of the images, embedded [N, E].
        moves: displacements of keys [D, E].
        centre: mean key before the similarity embeds it [E].
    """

    images: Tensor
    keys: Tensor
    moves: Tensor
    centre: Tensor

    @classmethod
    def of(cls, model: Model, guide: Guide, images: Tensor, *, moves: int) -> Stretched:
        """Encode images, and distorted ones of the first of them."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(images), generator=generator)[:moves]
        images = torch.cat([images[chosen], images[~torch.isin(torch.arange(len(images)), chosen)]])
        index = AddressIndex.encode(model, guide, images)
        kept, similarity = index.kept, cast("Any", guide.similarity)
        assert kept.keys is not None
        with torch.no_grad():
            parts = distorted(images[:moves], generator).split(2048)
            raw = torch.cat([guide.networks.query(part.float()).key for part in parts])
            moved = similarity.embed(raw, kept.centre)
        return cls(images, kept.keys, moved - kept.keys[:moves], kept.centre)

    def __call__(self, rows: Tensor) -> Tensor:
        """Keys of some entries, float32 [n, E]."""
        image, turn = rows % len(self.images), rows // len(self.images)
        move = (image * MIX[0] + turn * MIX[1]) % len(self.moves)
        moved = self.keys[image] + self.moves[move] * (turn > 0)[:, None]
        return F.normalize(moved, dim=-1)

    def index(
        self,
        programs: tuple[Model, Guide],
        size: int,
        *,
        dtype: torch.dtype | None,
        search: InvertedLists | None,
    ) -> Repeating:
        """An index of so many entries."""
        lists = None if search is None else Lists.build(search, size, self, Ranks())
        keys = None if dtype is None else self.kept(size, dtype)
        blank = self.images[:1].expand(size, -1, -1, -1)  # no memory of its own; `Repeating` reads the images
        kept = Keys(blank, None, keys, self.centre, torch.zeros(size), fingerprint_of(*programs), lists)
        return Repeating(*programs, kept, self.images)

    def kept(self, size: int, dtype: torch.dtype) -> Tensor:
        """Keys of all entries."""
        keys = torch.empty(size, self.keys.shape[1], dtype=dtype)
        for rows in torch.arange(size).split(65536):
            keys[rows[0] : rows[-1] + 1] = self(rows)
        return keys


class Repeating(AddressIndex):
    """An index whose entries repeat some images."""

    def __init__(self, model: Model, guide: Guide, kept: Keys, images: Tensor) -> None:
        super().__init__(model, guide, kept)
        self.images = images

    def part(self, address: Tensor) -> Memory:
        """The images that the entries repeat."""
        used, rows = (address % len(self.images)).unique(return_inverse=True)
        return SelectedMemory(Memory(self.images[used].float()), rows)


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn images by up to 0.15, shift them by up to 1.5 pixels, change their size by up to 10 %; bytes."""
    draw = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle, factor = 0.15 * draw[0], 1 + 0.1 * draw[1]
    shift = draw[2:].T * 1.5 / 14
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    maps = torch.cat([turn * factor[:, None, None], shift[:, :, None]], 2)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return (F.grid_sample(images.float(), grid, align_corners=False) > 0.5).to(torch.uint8)


def angle_between(keys: Tensor, others: Tensor) -> float:
    """Median angle, in degrees."""
    cosine = (F.normalize(keys, dim=-1) * F.normalize(others, dim=-1)).sum(-1)
    return math.degrees(cosine.clamp(-1, 1).acos().median().item())
