"""Images that a visitor may fill the memory with: one of each character of an alphabet, or those of a folder."""

from __future__ import annotations

import numpy as np
import torch

from vma_pyro.data.records import ImageClasses
from vma_pyro.demo.format import Format
from vma_pyro.demo.messages import MOST_ENTRIES, Bank, Tile

MOST_BANKS = 50  # all of Omniglot


def make_banks(characters: ImageClasses) -> list[Bank]:
    """Make a bank of each alphabet, up to `MOST_BANKS` of up to 200 tiles: the first image of each character."""
    banks = []
    for alphabet in list(dict.fromkeys(characters.groups))[:MOST_BANKS]:
        chosen = characters.of_groups([alphabet])
        banks.append(_bank(alphabet, chosen, chosen.offsets[:MOST_ENTRIES]))
    return banks


def bank_of(name: str, images: ImageClasses) -> Bank:
    """Make one bank of up to 200 images: the first of each class, then the second, and so on."""
    order = np.argsort(np.concatenate([np.arange(count) for count in images.counts]), kind="stable")
    return _bank(name, images, order[:MOST_ENTRIES])


def _bank(name: str, images: ImageClasses, rows: np.ndarray) -> Bank:
    format_ = Format(images.image_shape, images.bits)
    written = format_.write(images.as_float(torch.from_numpy(np.ascontiguousarray(images.pixels[rows]))))
    of = np.repeat(np.arange(len(images)), images.counts)[rows]
    tiles = [Tile(image=image, label=images.names[c]) for image, c in zip(written, of, strict=True)]
    return Bank(name=name, tiles=tiles)
