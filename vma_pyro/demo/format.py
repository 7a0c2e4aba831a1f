"""How images travel between the page and the model: as digits 0 and 1, or as bytes in hexadecimal."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pydantic import StringConstraints
from torch import Tensor, nn

from vma_pyro.evaluation import undisturbed
from vma_pyro.memory import Memory

MOST_REPEATED = 50_000  # repetitions in a pattern, which would take too much memory


class Format(NamedTuple):
    """The images that a model takes.

    Attributes:
        shape: [C, height, width].
        bits: 1 of images of ink (1) on paper (0), each a row of digits; 8 of grey and colour, each a row of pairs
            of hexadecimal digits, colour by colour.
    """

    shape: tuple[int, int, int] = (1, 28, 28)
    bits: int = 1

    @property
    def pattern(self) -> str:
        """The regular expression of an image."""
        numbers = math.prod(self.shape)
        return rf"^[01]{{{numbers}}}$" if self.bits == 1 else rf"^[0-9a-f]{{{2 * numbers}}}$"

    def constraints(self) -> list[Any]:
        """What pydantic is to check of an image."""
        numbers = math.prod(self.shape) * (1 if self.bits == 1 else 2)
        if numbers < MOST_REPEATED:
            return [StringConstraints(pattern=self.pattern)]
        return [StringConstraints(min_length=numbers, max_length=numbers, pattern=r"^[0-9a-f]*$")]

    @property
    def description(self) -> str:
        """An image, in words."""
        colours, height, width = self.shape
        if self.bits == 1:
            return f"{height} x {width} pixels, row by row: 1 is ink, 0 is paper."
        return f"{colours} x {height} x {width} bytes in hexadecimal, colour by colour, row by row: ff is light."

    def read(self, images: list[str]) -> Tensor:
        """Convert images as they are sent to floats from 0 to 1, [N, C, height, width]."""
        if self.bits == 1:
            digits = torch.frombuffer(bytearray("".join(images), "ascii"), dtype=torch.uint8)
            return (digits - ord("0")).float().reshape(-1, *self.shape)
        content = torch.frombuffer(bytearray.fromhex("".join(images)), dtype=torch.uint8)
        return content.float().reshape(-1, *self.shape) / 255

    def write(self, images: Tensor) -> list[str]:
        """Convert images [N, C, height, width] with values from 0 to 1 to what is sent."""
        if self.bits == 1:
            return ["".join(map(str, row)) for row in images.flatten(1).int().tolist()]
        return as_bytes(images)


def as_bytes(images: Tensor) -> list[str]:
    """Write values from 0 to 1, [N, C, height, width], as hexadecimal bytes."""
    return [bytes(row).hex() for row in (255 * images.flatten(1)).round().clamp(0, 255).int().tolist()]


def format_of(model: nn.Module) -> Format:
    """Ask a model for the shape of its images, and whether it takes any that are not binary."""
    shape = tuple(getattr(getattr(model, "networks", None), "image_shape", (1, 28, 28)))
    device = next(iter(model.parameters())).device
    part = getattr(model, "likelihood", None)
    levels = getattr(getattr(part, "pixels", part), "levels", 256)
    if levels != 256:
        raise ValueError(f"load: expected a likelihood of 256 levels, as images have, got {levels}")
    with undisturbed(model, seed=0):
        try:
            model(Memory(torch.full((1, *shape), 128 / 255, device=device)), num_images=1)
        except ValueError:
            if shape[0] != 1:
                raise ValueError(f"load: expected binary images of one colour, got {shape[0]}") from None
            return Format(shape, 1)
    return Format(shape, 8)
