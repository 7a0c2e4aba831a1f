"""Images that a model generates, and pictures of them and of its lookups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pyro import poutine
from torch import Tensor, nn

from common.plots import save
from vma_pyro.evaluation import distribution_at, undisturbed
from vma_pyro.memory import Memory


class Generated(NamedTuple):
    """Images generated from one entry each.

    Attributes:
        drawn: of p(x | z, m), for z drawn from p(z | m) [N, number, C, height, width].
        mean: E[x | z, m] for the same z; of likelihoods without a formula for it the mean of some draws.
    """

    drawn: Tensor
    mean: Tensor


def generate(model: nn.Module, entries: Tensor, *, number: int, seed: int = 0) -> Generated:
    """Draw images from entries, each the only one of its memory.

    Args:
        model: program of (memory, x).
        entries: [N, C, height, width].
        number: images per entry.
        seed: of the random stream.
    """
    memory = Memory(entries.unsqueeze(1), learned=True)  # they may be: ink probabilities
    with undisturbed(model, seed=seed):
        plate = pyro.plate("samples", number, dim=-2)
        trace = poutine.trace(plate(model)).get_trace(memory)
        drawn: Any = trace.nodes["x"]["value"]
        mean = distribution_at(trace, "x").mean
    return Generated(drawn.transpose(0, 1), mean.transpose(0, 1))


def save_generated(path: Path, model: nn.Module, entries: Tensor, *, title: str, ink: bool = True) -> None:
    """Draw six images generated from each entry [N, C, height, width], and E[x | z, m] of the same z beside them.

    Args:
        path: of the picture.
        model: program of (memory, x).
        entries: each is the only entry of its memory.
        title: of the picture.
        ink: see `pixels`.
    """
    made = generate(model, entries, number=6)
    blocks = [pixels(images, ink=ink) for images in made]
    save_samples(path, pixels(entries, ink=ink), blocks, title=title)


def pixels(images: Tensor, *, ink: bool = True) -> Any:
    """Images [..., C, height, width] as a picture shows them, [..., height, width] or [..., height, width, 3].

    Args:
        images: values from 0 to 1.
        ink: whether 1 is ink, black on white paper; else it is light.
    """
    shown = 1 - images if ink else images
    grey = shown.shape[-3] == 1
    return (shown.squeeze(-3) if grey else shown.movedim(-3, -1)).float().clamp(0, 1).cpu().numpy()


def save_samples(path: Path, entries: np.ndarray, blocks: Sequence[np.ndarray], *, title: str) -> None:
    """One entry per row on the left, blocks of images generated from it to its right (figure 4A of the paper).

    Args:
        path: of the picture.
        entries: [rows, *image], as `pixels` gives them.
        blocks: [rows, columns, *image] each.
        title: of the picture.
    """
    rows, (height, width), pad, gap = len(entries), entries.shape[1:3], 2, 10  # the gap is between the blocks
    groups = [entries[:, None], *blocks]
    columns = sum(group.shape[1] for group in groups)
    wide = columns * (width + pad) + (len(groups) - 1) * gap - pad
    canvas = np.ones((rows * (height + pad) - pad, wide, *entries.shape[3:]))
    figure = Figure(figsize=(0.55 * width / height * columns + 0.4, 0.55 * rows + 0.5), layout="constrained")
    axes = figure.add_subplot()
    left = 0
    for group in groups:
        if left:
            axes.axvline(left + gap / 2 - pad / 2 - 0.5, color="tab:red", linewidth=1)
            left += gap
        for column in range(group.shape[1]):
            for row in range(rows):
                top = row * (height + pad)
                canvas[top : top + height, left : left + width] = group[row, column]
            left += width + pad
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    save(figure, path, dpi=150)


def save_posterior(
    path: Path,
    targets: np.ndarray,
    probs: np.ndarray,
    entries: np.ndarray,
    entry_labels: np.ndarray,
    target_labels: np.ndarray,
    *,
    top: int = 5,
) -> None:
    """Targets, q(a|x) over the memory, and the most probable entries (figure 3 of the paper).

    Args:
        path: of the picture.
        targets: [rows, *image], as `pixels` gives them.
        probs: q(a|x) [rows, S].
        entries: the memory [S, *image].
        entry_labels: class of each entry [S]; entries of one class stand together.
        target_labels: class of each target [rows].
        top: how many entries to show.
    """
    rows, width = len(targets), 11.0
    top = min(top, len(entries))
    height = 1.35 * rows + 0.4
    figure = Figure(figsize=(width, height))
    # All images stand on one canvas, in inches: axes of their own would take seconds to lay out.
    limits: dict[str, Any] = {"xlim": (0, width), "ylim": (0, height), "autoscale_on": False}
    canvas = figure.add_axes((0.0, 0.0, 1.0, 1.0), xticks=[], yticks=[], frame_on=False, **limits)
    right = width - 1.02 * top
    for row in range(rows):
        bottom = height - 0.25 - 1.35 * (row + 1) + 0.35
        _show(canvas, targets[row], left=0.1, bottom=bottom)
        bars = figure.add_axes((1.45 / width, bottom / height, (right - 1.6) / width, SIDE / height))
        own = entry_labels == target_labels[row]
        for which, colour in ((own, "tab:red"), (~own, "tab:gray")):  # a bar for each entry takes a second to draw
            heights = np.pad(np.where(which, probs[row], 0.0), 1)  # the first and the last are whole, too
            bars.fill_between(np.arange(-1, len(entries) + 1), heights, step="mid", color=colour, linewidth=0)
        # Alternate shades mark the classes of the memory.
        for label in np.unique(entry_labels)[::2]:
            where = np.flatnonzero(entry_labels == label)
            bars.axvspan(where[0] - 0.5, where[-1] + 0.5, color="tab:blue", alpha=0.08, linewidth=0)
        bars.set(xlim=(-0.5, len(entries) - 0.5), ylim=(0, max(0.05, 1.1 * probs[row].max())))
        bars.tick_params(labelsize=7)
        for place, entry in enumerate(np.argsort(-probs[row])[:top]):
            left = right + 1.02 * place
            _show(canvas, entries[entry], left=left, bottom=bottom, frame="tab:red" if own[entry] else "tab:gray")
            canvas.text(left + SIDE / 2, bottom - 0.14, f"{probs[row, entry]:.2f}", fontsize=7, ha="center")
    bars.set_xlabel("address a", fontsize=8)
    for left, text, align in (
        (0.1 + SIDE / 2, "x", "center"),
        ((1.35 + right) / 2, "q(a | x, M) over the entries; red: entries of x's class", "center"),
        (right, "most probable entries", "left"),
    ):
        canvas.text(left, height - 0.18, text, fontsize=9, ha=align)
    save(figure, path, dpi=150)


SIDE = 0.95  # of an image, inches


def _show(canvas: Any, image: np.ndarray, *, left: float, bottom: float, frame: str = "black") -> None:
    extent = (left, left + SIDE, bottom, bottom + SIDE)
    canvas.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect="auto")
    canvas.add_patch(Rectangle((left, bottom), SIDE, SIDE, fill=False, edgecolor=frame, linewidth=0.8))
