"""Pictures from plain arrays; no model in here, and no picture that costs a report."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

from vma_pyro._system.atomic import write_atomically

# Ten colours that people with any colour vision tell apart (Petroff 2021), in all pictures of all experiments.
COLOURS = ["3f90da", "ffa90e", "bd1f01", "94a4a2", "832db6", "a96b59", "e76300", "b9ac70", "717581", "92dadd"]
matplotlib.rcParams["axes.prop_cycle"] = cycler(color=[f"#{colour}" for colour in COLOURS])


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
    """Draw these lines into one part of a picture; solid ones take their colours from the `first_colour`-th on."""
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


def save_points(path: Path, points: Mapping[str, tuple[float, float]], *, x: str, y: str, real: str) -> None:
    """One point with a label for each of several things; that of this name is the real one, a star.

    Args:
        path: of the picture.
        points: label to x and y.
        x, y: labels of the axes, with units.
        real: the label of the star.
    """
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for n, (label, place) in enumerate(points.items()):
        style: dict[str, Any] = (
            {"marker": "*", "s": 160, "color": "black"} if label == real else {"s": 40, "color": f"C{n % 10}"}
        )
        axes.scatter(*place, label=label, **style)
        right = place[0] == max(x for x, _ in points.values())  # its label goes to the left, within the picture
        side: dict[str, Any] = {"xytext": (-6, 6), "ha": "right"} if right else {"xytext": (6, 6), "ha": "left"}
        axes.annotate(label, place, textcoords="offset points", fontsize=8, **side)
    axes.margins(0.2)
    axes.set(xlabel=x, ylabel=y)
    save(figure, path)


def save_training(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]], *, log_memory: float) -> None:
    """Bound, KL(a) and KL(z) against updates (figure 2 of the paper).

    Args:
        path: of the picture.
        runs: label to the lines of its metrics.jsonl; without the site `address` or `z` there is no such curve.
        log_memory: log|M|, the largest KL(a) under a uniform p(a), in nats.
    """
    # A run too short for a line shows points.
    short = any(sum("bound" in line for line in lines) < 3 for lines in runs.values())
    marked: dict[str, Any] = {"linewidth": 1, "marker": "o" if short else None, "markersize": 4}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, kl_address, kl_z = figure.subplots(1, 3)
    for label, lines in runs.items():
        training = [line for line in lines if "bound" in line]
        validation = [line for line in lines if "validation_nll" in line]
        updates = [line["update"] for line in training]
        (curve,) = bound.plot(updates, [line["bound"] for line in training], label=f"{label}, training", **marked)
        color = curve.get_color()
        if validation:
            bound.plot(
                [line["update"] for line in validation],
                [-line["validation_nll"] for line in validation],
                linestyle="--",
                color=color,
                label=f"{label}, held out",
                marker="x" if short else None,
            )
        for axes, name in ((kl_address, "kl_address"), (kl_z, "kl_z")):
            seen = [(line["update"], line[name]) for line in training if name in line]
            if any(kl for _, kl in seen):
                axes.plot(*zip(*seen, strict=True), color=color, label=label, **marked)
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
