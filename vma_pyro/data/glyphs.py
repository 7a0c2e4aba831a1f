"""Procedural characters: a small Omniglot that needs no download.

An alphabet is a handful of stroke shapes (lines, arcs, waves, hooks, loops). A character is a program of two to
four of them, each attached to a point of an earlier one. An example is one rendering of the program by an
unsteady hand: affine jitter, noise on the control points, another pen.
"""

from __future__ import annotations

import numpy as np

from vma_pyro.data.records import Characters

STROKES_PER_ALPHABET = 7
CHARACTERS_PER_ALPHABET = 20
MAX_STROKES = 4
POINTS = 24  # per stroke; on 28 pixels neighbouring points are at most a pixel or so apart
SIZE = 28

# Prototypes of strokes: cubic Bezier curves, four control points (x, y), about one unit long.
_PROTOTYPES = np.array(
    [
        [[-0.5, 0.0], [-0.17, 0.0], [0.17, 0.0], [0.5, 0.0]],  # line
        [[-0.5, 0.0], [-0.3, 0.45], [0.3, 0.45], [0.5, 0.0]],  # arc
        [[-0.5, 0.0], [-0.1, 0.7], [0.1, -0.7], [0.5, 0.0]],  # wave
        [[-0.5, 0.0], [0.2, 0.0], [0.6, 0.1], [0.4, 0.5]],  # hook
        [[-0.1, -0.3], [0.9, 0.3], [-0.9, 0.3], [0.1, -0.3]],  # loop
        [[-0.3, -0.3], [0.6, -0.3], [0.6, 0.4], [-0.3, 0.3]],  # bowl
    ]
)


def load(*, classes: int = 300, examples: int = 20, seed: int = 0) -> Characters:
    """Make random characters, the same on every call with the same arguments.

    Args:
        classes: number of characters, in alphabets of `CHARACTERS_PER_ALPHABET`.
        examples: renderings of each.
        seed: of the whole set; other seeds give other characters.

    Returns:
        Images uint8 {0, 1} [classes, examples, 28, 28]; alphabets "glyphs-<seed>-<number>".

    Raises:
        ValueError: no classes or examples, or a negative seed.
    """
    for name, value, least in (("classes", classes, 1), ("examples", examples, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    images, names, alphabets = [], [], []
    for start in range(0, classes, CHARACTERS_PER_ALPHABET):
        number = start // CHARACTERS_PER_ALPHABET
        # One generator per alphabet: the first alphabets do not depend on how many follow.
        rng = np.random.default_rng([seed, number])
        pool = _strokes(rng)
        count = min(CHARACTERS_PER_ALPHABET, classes - start)
        programs = [_character(rng, pool) for _ in range(CHARACTERS_PER_ALPHABET)][:count]
        images.append(_render(rng, np.stack(programs), examples))
        names += [f"character{i + 1:02d}" for i in range(count)]
        alphabets += [f"glyphs-{seed}-{number:03d}"] * count
    return Characters(np.concatenate(images), tuple(names), tuple(alphabets))


def _strokes(rng: np.random.Generator) -> np.ndarray:
    """Draw the stroke shapes of one alphabet [STROKES_PER_ALPHABET, 4, 2], centred at 0."""
    shapes = _PROTOTYPES[rng.integers(len(_PROTOTYPES), size=STROKES_PER_ALPHABET)]
    shapes = shapes + rng.normal(0, 0.08, shapes.shape)
    # Writing prefers the horizontal, the vertical and the two diagonals.
    angles = rng.integers(8, size=STROKES_PER_ALPHABET) * np.pi / 4 + rng.normal(0, 0.15, STROKES_PER_ALPHABET)
    lengths = rng.uniform(0.5, 1.0, STROKES_PER_ALPHABET)
    return np.einsum("sij,spj->spi", _rotation(angles) * lengths[:, None, None], shapes)


def _character(rng: np.random.Generator, pool: np.ndarray) -> np.ndarray:
    """Draw the control points of one character in the unit square [MAX_STROKES, 4, 2]; absent strokes are NaN."""
    program = np.full((MAX_STROKES, 4, 2), np.nan)
    chosen = rng.choice(len(pool), size=rng.integers(2, MAX_STROKES + 1), replace=False)
    for i, shape in enumerate(chosen):
        stroke = pool[shape] * rng.uniform(0.8, 1.2)
        if i:
            # Attach the start, the middle or the end of the stroke to such a point of an earlier one.
            earlier = program[rng.integers(i)]
            stroke = stroke + _anchor(rng, earlier) - _anchor(rng, stroke)
        program[i] = stroke
    points = bezier(program[: len(chosen)]).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    # Fill the frame in the longer direction, but do not blow up what is small.
    scale = 0.72 / max(float((high - low).max()), 0.6)
    return (program - (low + high) / 2) * scale + 0.5


def _anchor(rng: np.random.Generator, stroke: np.ndarray) -> np.ndarray:
    return bezier(stroke[None])[0, rng.choice([0, POINTS // 2, POINTS - 1])]


def bezier(control: np.ndarray) -> np.ndarray:
    """Trace points along cubic Bezier curves: [..., 4, 2] to [..., POINTS, 2]."""
    t = np.linspace(0, 1, POINTS)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return np.einsum("pc,...cd->...pd", weights, control)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Make the matrices of rotations [..., 2, 2]."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _render(rng: np.random.Generator, programs: np.ndarray, examples: int) -> np.ndarray:
    """Draw each program `examples` times: [C, MAX_STROKES, 4, 2] to uint8 [C, examples, 28, 28]."""
    shape = (len(programs), examples)
    control = programs[:, None] + rng.normal(0, 0.022, (*shape, *programs.shape[1:]))
    control = control + rng.normal(0, 0.015, (*shape, MAX_STROKES, 1, 2))  # strokes slip as a whole
    matrix = _rotation(rng.normal(0, 0.12, shape)) * rng.uniform(0.85, 1.1, (*shape, 1, 2))
    matrix[..., 0, 1] += rng.normal(0, 0.12, shape)  # slant
    offset = 0.5 + rng.normal(0, 0.03, (*shape, 1, 1, 2))
    control = np.einsum("ceij,cespj->cespi", matrix, control - 0.5) + offset
    points = bezier(control).reshape(-1, MAX_STROKES * POINTS, 2) * SIZE
    radius = rng.uniform(0.65, 1.1, len(points))  # of the pen, in pixels
    return _ink(points, radius).reshape(*shape, SIZE, SIZE)


def _ink(points: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Ink the pixels whose centre is within the radius [N] of one of the points [N, P, 2]: uint8 [N, 28, 28]."""
    image, point = np.nonzero(~np.isnan(points[..., 0]))  # absent strokes are NaN
    points, radius = points[image, point], radius[image]
    ink = np.zeros((image.max() + 1, SIZE, SIZE), np.uint8)
    # The radius is at most 1.1, so that only the pixels around the point's own can be inked.
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            x, y = (np.floor(points) + (dx, dy)).astype(int).T
            distance = np.hypot(x + 0.5 - points[:, 0], y + 0.5 - points[:, 1])
            inked = (distance <= radius) & (np.minimum(x, y) >= 0) & (np.maximum(x, y) < SIZE)
            ink[image[inked], y[inked], x[inked]] = 1
    return ink
