"""The canvas of AIR's small scenes: sizes, the priors of objects, and how patches are drawn and read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

STEPS, FACTORS = 2, 2
SIDE, PATCH = 16, 6  # pixels of the canvas, which reaches from -1 to 1, and of a patch
SIZE = 0.4  # half the width of an object on the canvas
PRESENT, NOISE = 0.6, 0.8  # rho and sigma_x
CENTRES, SPREAD = torch.tensor([[-0.4, 0.0], [0.4, 0.0]]), torch.tensor([0.2, 0.3])  # c and sigma_u, (x, y)


def centres_of_pixels(side: int) -> Float[Tensor, "S S 2"]:
    """Make the places (x, y) of the pixels of a square from -1 to 1."""
    axis = (2 * torch.arange(side) + 1) / side - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


def draw(patch: Float[Tensor, "*N C G G"], where: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N C S S"]:
    """Draw patches on empty canvases."""
    grid = (centres_of_pixels(SIDE).to(where) - where[..., None, None, :]) / SIZE
    return _read(patch, grid)


def glimpse(canvas: Float[Tensor, "*N C S S"], where: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N C G G"]:
    """Read the patches at places of canvases: the way back."""
    return _read(canvas, SIZE * centres_of_pixels(PATCH).to(where) + where[..., None, None, :])


def _read(image: Tensor, grid: Tensor) -> Tensor:
    image = image.expand(*grid.shape[:-3], *image.shape[-3:])
    read = F.grid_sample(image.flatten(0, -4), grid.flatten(0, -4), align_corners=False)
    return read.reshape(*grid.shape[:-3], *read.shape[-3:])
