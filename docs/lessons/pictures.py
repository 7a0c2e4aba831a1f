"""What the lessons draw with: pictures kept as files, and grids of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "lessons"
GAP, FRAME = 2, 0.85  # pixels between images, and their grey


class Picture:
    """A picture on disk, which a notebook shows if it is the last expression of a cell."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


def keep(figure: Figure, name: str) -> Picture:
    """Save a picture as runs/lessons/NAME.png.

    Args:
        figure: the picture.
        name: of the file, without ending.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path.relative_to(ROOT)}")
    return Picture(path)


def rows_of(images: Sequence[Tensor], titles: Sequence[str] = (), *, names: Sequence[str] = ()) -> Figure:
    """Images in columns, one row for each example.

    Args:
        images: columns of images [rows, 1, 28, 28], ink 1.
        titles: of the columns.
        names: of the rows.
    """
    grid = 1 - torch.stack(list(images), 1).squeeze(2)  # [rows, columns, height, width]
    rows, columns, height, width = grid.shape
    # One canvas with a light frame around each image: axes of their own take a second for fifty images.
    framed = F.pad(grid, (0, GAP, 0, GAP), value=FRAME).transpose(1, 2).flatten(2).flatten(0, 1)
    figure = Figure(figsize=(0.75 * columns + 0.6, 0.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(framed[:-GAP, :-GAP].numpy(), cmap="gray", vmin=0, vmax=1)
    across, down = (
        [n * (size + GAP) + size / 2 for n in range(number)] for number, size in ((columns, width), (rows, height))
    )
    axes.set_xticks(across[: len(titles)], titles, fontsize=8)
    axes.set_yticks(down[: len(names)], names, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure
