"""Small pictures in folders, as people have them: shapes in colour, of many sizes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("ellipse", "rectangle", "polygon")


def shape(rng: np.random.Generator, kind: int, size: tuple[int, int], fill: tuple[int, int, int]) -> Image.Image:
    """A filled shape on nearly white paper, [width, height]."""
    width, height = size
    picture = Image.new("RGB", size, (250, 250, 245))
    left, top = width * rng.uniform(0.1, 0.3), height * rng.uniform(0.1, 0.3)
    right, bottom = left + 0.5 * width, top + 0.5 * height
    corners = [(left, bottom), ((left + right) / 2, top), (right, bottom)]
    draw = getattr(ImageDraw.Draw(picture), SHAPES[kind % 3])
    draw(corners if kind % 3 == 2 else [left, top, right, bottom], fill=fill)
    return picture


def folder_of_shapes(root: Path, counts: list[int], *, sides: tuple[int, int] = (24, 60), seed: int = 0) -> Path:
    """`root/class*/NN.png`, so many of each class, each of another size."""
    rng = np.random.default_rng(seed)
    for number, count in enumerate(counts):
        folder = root / f"class{number:02d}"
        folder.mkdir(parents=True)
        fill = tuple(int(value) for value in rng.integers(30, 200, 3))
        for example in range(count):
            size = tuple(int(side) for side in rng.integers(*sides, 2))
            shape(rng, number, size, fill).save(folder / f"{example:02d}.png")
    return root
