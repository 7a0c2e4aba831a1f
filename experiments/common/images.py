"""Images that a model generates, and pictures of them and of its lookups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pyro import poutine
from torch import Tensor, nn

from common.plots import save
from vma_pyro.evaluation import distribution_at, undisturbed
from vma_pyro.memory import Memory


def expected_images(model: nn.Module, entries: Tensor, *, num_samples: int, seed: int = 0) -> Tensor:
    """E[x | z, m] for z drawn from p(z | m): ink probabilities of images generated from one entry each.

    Args:
        model: program of (memory, x).
        entries: [N, 1, 28, 28]; each is the only entry of its memory.
        num_samples: images per entry.
        seed: of the random stream.

    Returns:
        The images [N, num_samples, 1, 28, 28].
    """
    memory = Memory(entries.unsqueeze(1), learned=True)  # they may be: ink probabilities
    with undisturbed(model, seed=seed):
        plate = pyro.plate("samples", num_samples, dim=-2)
        trace = poutine.trace(plate(model)).get_trace(memory)
    mean: Tensor = distribution_at(trace, "x").mean
    return mean.transpose(0, 1)


def save_generated(path: Path, model: nn.Module, entries: Tensor, *, title: str) -> None:
    """Draw twelve images generated from each entry [N, 1, 28, 28], beside it."""
    samples = expected_images(model, entries, num_samples=12)
    save_samples(path, pixels(entries), pixels(samples), title=title)


def pixels(images: Tensor) -> Any:
    """[..., 1, 28, 28] to an array [..., 28, 28]."""
    return images.squeeze(-3).float().cpu().numpy()


def save_samples(path: Path, entries: np.ndarray, samples: np.ndarray, *, title: str) -> None:
    """One entry per row on the left, samples generated from it to its right (figure 4A of the paper).

    Args:
        path: of the picture.
        entries: [rows, 28, 28], 1 = ink.
        samples: [rows, columns, 28, 28], in [0, 1].
        title: of the picture.
    """
    rows, columns = samples.shape[:2]
    pad = 2
    cell = entries.shape[-1] + pad
    gap = 10  # between the entry and its samples
    canvas = np.zeros((rows * cell - pad, (columns + 1) * cell + gap - pad))
    for row in range(rows):
        for column, image in enumerate([entries[row], *samples[row]]):
            left = column * cell + (gap if column else 0)
            canvas[row * cell : row * cell + image.shape[0], left : left + image.shape[1]] = image
    figure = Figure(figsize=(0.55 * (columns + 1) + 0.4, 0.55 * rows + 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(1 - canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axvline(cell - pad / 2 + gap / 2 - 0.5, color="tab:red", linewidth=1)
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
        targets: [rows, 28, 28].
        probs: q(a|x) [rows, S].
        entries: the memory [S, 28, 28].
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
    canvas.imshow(1 - image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect="auto")
    canvas.add_patch(Rectangle((left, bottom), SIDE, SIDE, fill=False, edgecolor=frame, linewidth=0.8))
