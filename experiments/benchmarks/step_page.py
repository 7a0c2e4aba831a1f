"""What the figures of `step.py` say, as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contenders import OURS32, OWN, PUBLIC, REENCODING, SIZE, K
from matplotlib.figure import Figure

from common import plots
from common.results import Picture
from common.timing import Spread
from vma_pyro._system.markdown import table

Rows = list[dict[str, Any]]


def page(rows: Rows, rates: dict[str, float], *, mixed: bool) -> list[str | Picture]:
    """All of the page.

    Args:
        rows: the configurations that were measured.
        rates: of the machine, in GFLOP/s.
        mixed: whether ours is in bfloat16.
    """
    precision = "bfloat16" if mixed else "float32: this one is not faster in bfloat16"
    parts: list[str | Picture] = [
        f"K = {K}, |M| = {SIZE}; medians, quartiles in brackets; all take turns, and those of the first table "
        "also on their own, three times as often. At best a product of matrices runs at "
        f"{rates['matrix product']:.0f} GFLOP/s here and a 3x3 convolution at {rates['convolution']:.0f}; shares "
        "are of these. Before timing, bound and gradient of ours and of the hand-written version were equal to "
        f"{max(max(r['difference'].values()) for r in rows):.0e} on the same samples.",
        "## Ours over the hand-written version",
        f"Ratios of times. Ours is in the precision that suits the processor ({precision}) unless float32 is said;"
        " compiled: with networks that `torch.compile` has translated, which `fit` uses in runs of 20 minutes or "
        "more where it finds updates to be faster by it.",
        ours_by_hand(rows),
        "## Against re-encoding every read, with a second encoder for keys",
        "How many times faster ours is, both in float32. The other has a memory of its own for every query. Ours "
        "with one memory for all queries solves a smaller problem (|M| encodings instead of |M| times the number "
        "of images); with a memory per query the same one. Twice each: with our networks as they are, and in "
        "torch's default layout of images, which the public code has.",
        ours_reencoding(rows),
        "Counted: the ratio of floating-point operations per update. What is measured differs from it because the "
        "two spend them on different shapes: the other's convolutions over a thousand entries at once reach a "
        "higher share of the rate of matrix products than ours over a few dozen, most of all in narrow networks "
        "(the shares are below); and what is not a convolution (the likelihood, reading the memory, Adam) is "
        "counted as nothing and takes as long for both. With a memory per query, what is saved is the second "
        "encoding of the entries that are read: a tenth of the operations.",
        "## All",
    ]
    for row in rows:
        parts += [f"Width {row['width']:g}, {row['batch']} images:", all_contenders(row, rates)]
    return [*parts, Picture("step.png", "Images per second", lambda path: draw(path, rows))]


def ours_by_hand(rows: Rows) -> str:
    """Ours over the same mathematics by hand."""
    head = ["", *(f"width {r['width']:g}, {r['batch']} images" for r in rows)]
    pairs = list(rows[0]["ratios"])
    return table(head, [[pair, *(Spread.read(r["ratios"][pair]) for r in rows)] for pair in pairs])


def ours_reencoding(rows: Rows) -> str:
    """How many times faster ours is than one that encodes every read."""
    lines = [
        [r["width"], r["batch"], what]
        + [Spread.read(r["speedup"][mine][theirs]) for theirs in (REENCODING, PUBLIC)]
        + [f"{r['speedup'][mine]['counted']:.2f}"]
        for r in rows
        for mine, what in ((OURS32, "one memory"), (OWN, "a memory per query"))
    ]
    return table(["width", "images", "ours", "same layout", "default layout", "counted"], lines)


def all_contenders(row: dict[str, Any], rates: dict[str, float]) -> str:
    """Every way to make an update, in one configuration."""
    lines = [
        [
            name,
            Spread.read(c["milliseconds"]),
            f"{c['images_per_second']:.0f}",
            f"{c['forward_gflop'] / 2:.2f}",
            f"{c['update_gflop']:.1f}",
            *(f"{100 * c['gflop_per_second'] / rate:.0f} %" for rate in rates.values()),
            "" if c["peak_gib"] is None else f"{c['peak_gib']:.2f}",
        ]
        for name, c in row["contenders"].items()
    ]
    head = ["", "ms", "images/s", "forward GMAC", "GFLOP", *(f"of a {name}" for name in rates), "peak GiB"]
    return table(head, lines)


def draw(path: Path, rows: Rows) -> None:
    """Images per second of each contender."""
    names = list(rows[0]["contenders"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows, strict=True):
        values = [row["contenders"][name]["images_per_second"] for name in names]
        axes.barh(names, values, color=["tab:blue" if "ours" in name else "tab:gray" for name in names])
        axes.bar_label(axes.containers[0], [f"{value:.0f}" for value in values], fontsize=8, padding=2)
        axes.set_title(f"width {row['width']:g}, {row['batch']} images", fontsize=10)
        axes.set(xlabel="training images per second")
        axes.margins(x=0.15)
    axes.invert_yaxis()  # which all share
    plots.save(figure, path, dpi=120)
