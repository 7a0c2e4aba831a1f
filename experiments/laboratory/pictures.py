"""Pictures of the laboratory: training curves, and signal-to-noise ratios against particles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from common.plots import save

Curves = Mapping[str, Sequence[Sequence[float]]]


def save_curves(path: Path, nll: Curves, kl_address: Curves) -> None:
    """Draw validation NLL, and KL(a), against updates and against seconds.

    Args:
        path: of the picture.
        nll: label to rows of (update, seconds, NLL in nats per image).
        kl_address: label to rows of (update, seconds, KL(a) in nats per image).
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, curves in zip(axes, (nll, kl_address), strict=True):
        for column, panel in enumerate(row):
            for position, (label, points) in enumerate(curves.items()):
                panel.plot(
                    [point[column] for point in points],
                    [point[2] for point in points],
                    linewidth=1.3,
                    color=f"C{position % 10}",
                    label=label,
                )
    values = [point[2] for points in nll.values() for point in points]
    if values:  # what has not begun to learn would flatten the rest
        axes[0, 0].set_ylim(min(values) - 1, min(min(values) + 40, max(values) + 1))
    axes[0, 0].set_ylabel("validation NLL, nats per image")
    axes[1, 0].set(xlabel="updates", ylabel="KL(a) in training, nats per image")
    axes[1, 1].set_xlabel("seconds")
    axes[0, 1].legend(fontsize=7)
    save(figure, path, dpi=130)


def save_slopes(path: Path, particles: Sequence[int], snr: Mapping[str, Sequence[float]]) -> None:
    """Draw log SNR against log K, with lines of slope +1/2 and -1/2 for comparison.

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
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7)
    save(figure, path, dpi=150)
