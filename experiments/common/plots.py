"""Pictures from plain arrays; no model in here, and no picture that costs a report."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vma_pyro._system.atomic import write_atomically


def drawn(path: Path, draw: Callable[[Path], object]) -> str:
    """Draw a picture, or say in one line why there is none: the figures are worth more than it is.

    Args:
        path: of the picture.
        draw: makes it at a path.

    Returns:
        Why it could not be drawn; nothing if it was.
    """
    try:
        draw(path)
    except Exception as error:  # a likelihood without a mean, a full disk, a missing font, ...
        told = str(error).strip().splitlines()
        reason = f"{type(error).__name__}{f': {told[0]}' if told else ''}"
        print(f"warning: {path.name} is not drawn ({reason})")
        return reason
    return ""


def save(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a picture as a whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    write_atomically(path, lambda file: file.write(image.getbuffer()))


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
    rows = len(targets)
    top = min(top, len(entries))
    figure = Figure(figsize=(11, 1.35 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 2 + top, squeeze=False, width_ratios=[1, 6, *[1] * top])
    for row in range(rows):
        _show(grid[row, 0], targets[row])
        bars = grid[row, 1]
        own = entry_labels == target_labels[row]
        bars.bar(np.arange(len(entries)), probs[row], color=np.where(own, "tab:red", "tab:gray"), width=0.9)
        # Alternate shades mark the classes of the memory.
        for label in np.unique(entry_labels)[::2]:
            where = np.flatnonzero(entry_labels == label)
            bars.axvspan(where[0] - 0.5, where[-1] + 0.5, color="tab:blue", alpha=0.08, linewidth=0)
        bars.set(xlim=(-0.5, len(entries) - 0.5), ylim=(0, max(0.05, 1.1 * probs[row].max())))
        bars.tick_params(labelsize=7)
        for place, entry in enumerate(np.argsort(-probs[row])[:top]):
            axes = grid[row, 2 + place]
            _show(axes, entries[entry], frame="tab:red" if own[entry] else "tab:gray")
            axes.set_xlabel(f"{probs[row, entry]:.2f}", fontsize=7, labelpad=2)
    grid[0, 0].set_title("x", fontsize=9)
    grid[0, 1].set_title("q(a | x, M) over the entries; red: entries of x's class", fontsize=9)
    grid[0, 2].set_title("most probable entries", fontsize=9, loc="left")
    grid[-1, 1].set_xlabel("address a", fontsize=8)
    save(figure, path, dpi=150)


Curves = Mapping[str, Sequence[Sequence[float]]]


def save_curves(path: Path, nll: Curves, kl_address: Curves) -> None:
    """Validation NLL, and KL(a), against updates and against seconds.

    Args:
        path: of the picture.
        nll: label to rows of (update, seconds, NLL in nats per image).
        kl_address: label to rows of (update, seconds, KL(a) in nats per image).
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, curves in zip(axes, (nll, kl_address), strict=True):
        for column, panel in enumerate(row):
            for position, (label, points) in enumerate(curves.items()):
                panel.plot(
                    [point[column] for point in points],
                    [point[2] for point in points],
                    linewidth=1,
                    color=f"C{position % 10}",
                    linestyle=("-", "--", ":")[position // 10 % 3],  # there are ten colours
                    label=label,
                )
    values = [point[2] for points in nll.values() for point in points]
    if values:  # what has not begun to learn would flatten the rest
        axes[0, 0].set_ylim(min(values) - 1, min(min(values) + 40, max(values) + 1))
    axes[0, 0].set_ylabel("validation NLL, nats per image")
    axes[1, 0].set(xlabel="updates", ylabel="KL(a) in training, nats per image")
    axes[1, 1].set_xlabel("seconds")
    axes[0, 1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path, dpi=130)


def save_slopes(path: Path, particles: Sequence[int], snr: Mapping[str, Sequence[float]]) -> None:
    """log SNR against log K, with lines of slope +1/2 and -1/2 for comparison.

    Args:
        path: of the picture.
        particles: K.
        snr: label to one signal-to-noise ratio per K.
    """
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in snr.items():
        # A signal that is lost in noise has no logarithm.
        found = [(k, value) for k, value in zip(particles, values, strict=True) if value > 0]
        axes.plot([k for k, _ in found], [v for _, v in found], marker="o", markersize=3, linewidth=1, label=label)
    middle = float(np.median([v for values in snr.values() for v in values if v > 0] or [1.0]))
    for slope in (0.5, -0.5):
        line = [middle * (k / particles[0]) ** slope for k in particles]
        axes.plot(particles, line, color="black", linewidth=0.6, linestyle=":", label=f"slope {slope:+}")
    axes.set(xscale="log", yscale="log", xlabel="runs of the model per image", ylabel="SNR of the address")
    axes.set_xticks(list(particles), [str(k) for k in particles])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    save(figure, path, dpi=150)


Lines = Mapping[str, Sequence[tuple[float, float, float | None]]]


def save_lines(path: Path, lines: Lines, *, x: str, y: str, log: bool = False, dashed: str = "\0") -> None:
    """Figures with their standard errors against one quantity.

    Args:
        path: of the picture.
        lines: label to points of (x, figure, standard error or None).
        x, y: labels of the axes, with units.
        log: whether x is on a logarithmic scale.
        dashed: lines whose label begins with this are dashed.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw_lines(figure.subplots(), lines, x=x, y=y, log=log, dashed=dashed)
    save(figure, path, dpi=150)


def draw_lines(
    axes: Any, lines: Lines, *, x: str, y: str, log: bool = False, dashed: str = "\0", first_colour: int = 0
) -> None:
    """The same into one part of a picture; its solid lines take their colours from the `first_colour`-th on."""
    solid = [label for label in lines if not label.startswith(dashed)]
    broken = [label for label in lines if label.startswith(dashed)]
    # Each dashed line goes with a solid one, in order; a single one stands for itself.
    colours = {label: f"C{n % 10}" for n, label in enumerate(solid, first_colour)}
    colours |= {label: f"C{n % 10}" if len(broken) > 1 else "black" for n, label in enumerate(broken)}
    for label, points in lines.items():
        places, values, errors = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            places,
            values,
            yerr=[0.0 if e is None else e for e in errors],
            color=colours[label],
            linestyle="--" if label in broken else "-",
            marker=None if label in broken else "o",
            markersize=3,
            linewidth=1,
            label=label,
        )
    if log:
        axes.set_xscale("log")
        ticks: list[float] = []
        for place in sorted({place for points in lines.values() for place, *_ in points}):
            if not ticks or place > 1.2 * ticks[-1]:  # others would overlap
                ticks.append(place)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2} if len(lines) > 4 else {}
    axes.legend(fontsize=7, **below)


def _show(axes: Any, image: np.ndarray, *, frame: str = "black") -> None:
    axes.imshow(1 - image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(frame)


def save_training(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]], *, log_memory: float) -> None:
    """Bound, KL(a) and KL(z) against updates (figure 2 of the paper).

    Args:
        path: of the picture.
        runs: label to the lines of its metrics.jsonl; without the site `address` or `z` there is no such curve.
        log_memory: log|M|, the largest KL(a) under a uniform p(a), in nats.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, kl_address, kl_z = figure.subplots(1, 3)
    for label, lines in runs.items():
        training = [line for line in lines if "bound" in line]
        validation = [line for line in lines if "validation_nll" in line]
        updates = [line["update"] for line in training]
        (curve,) = bound.plot(
            updates, [line["bound"] for line in training], linewidth=1, label=f"{label}, training"
        )
        color = curve.get_color()
        bound.plot(
            [line["update"] for line in validation],
            [-line["validation_nll"] for line in validation],
            linestyle="--",
            color=color,
            label=f"{label}, held out",
        )
        for axes, name in ((kl_address, "kl_address"), (kl_z, "kl_z")):
            seen = [(line["update"], line[name]) for line in training if name in line]
            if any(kl for _, kl in seen):
                axes.plot(*zip(*seen, strict=True), linewidth=1, color=color, label=label)
    finite = [line["bound"] for lines in runs.values() for line in lines if "bound" in line]
    if finite:
        # The first updates are hundreds of nats away and would flatten the rest.
        validated = [
            -line["validation_nll"] for lines in runs.values() for line in lines if "validation_nll" in line
        ]
        bound.set_ylim(np.quantile(finite, 0.05) - 10, max(finite + validated) + 5)
    kl_address.axhline(log_memory, color="black", linewidth=0.8, linestyle=":", label="log |M|")
    for axes, title in ((bound, "multi-sample bound"), (kl_address, "KL(a)"), (kl_z, "KL(z)")):
        axes.set(title=title, xlabel="updates", ylabel="nats per image")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    save(figure, path, dpi=150)
