"""Images that a visitor may fill the memory with: one of each character of an alphabet."""

from __future__ import annotations

import torch

from vma_pyro.data.records import Characters
from vma_pyro.demo.engine import digits
from vma_pyro.demo.messages import MOST_ENTRIES, Bank, Tile

MOST_BANKS = 50  # all of Omniglot


def make_banks(characters: Characters) -> list[Bank]:
    """Make a bank of each alphabet, up to `MOST_BANKS` of up to 200 tiles: the first image of each character."""
    banks = []
    for alphabet in list(dict.fromkeys(characters.alphabets))[:MOST_BANKS]:
        chosen = characters.of_alphabets([alphabet])
        images = digits(torch.from_numpy(chosen.images[:MOST_ENTRIES, 0]))
        tiles = [Tile(image=image, label=name) for image, name in zip(images, chosen.names, strict=False)]
        banks.append(Bank(name=alphabet, tiles=tiles))
    return banks
