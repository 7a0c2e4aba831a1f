"""What the lessons draw with: pictures kept as files, and grids of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "lessons"


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
    grid = torch.stack(list(images), 1).squeeze(2)  # [rows, columns, 28, 28]
    rows, columns = grid.shape[:2]
    figure = Figure(figsize=(0.75 * columns + 0.6, 0.75 * rows + 0.4), layout="constrained")
    for (row, column), axes in _each(figure.subplots(rows, columns, squeeze=False)):
        axes.imshow(1 - grid[row, column].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if row == 0 and column < len(titles):
            axes.set_title(titles[column], fontsize=8)
        if column == 0 and row < len(names):
            axes.set_ylabel(names[row], fontsize=8)
    return figure


def _each(grid: Any) -> Iterator[tuple[tuple[int, int], Any]]:
    return (((row, column), axes) for row, line in enumerate(grid) for column, axes in enumerate(line))
