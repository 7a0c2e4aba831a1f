"""What the figures of `step.py` say, as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from contenders import HAND, OURS, OWN, PUBLIC, REENCODING, SIZE, K
from page import table
from timing import Spread


def page(rows: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    """What the figures say."""
    lines = [
        f"K = {K}, |M| = {SIZE}; medians, quartiles in brackets; all take turns, and those of the first",
        "table also on their own, three times as often. At best a product of matrices runs at",
        f"{rates['matrix product']:.0f} GFLOP/s here and a 3x3 convolution at {rates['convolution']:.0f};",
        "shares are of these. Before timing, bound and gradient of ours and of the hand-written version were",
        f"equal to {max(max(r['difference'].values()) for r in rows):.0e} on the same samples.",
        "",
        "## Ours over the hand-written version",
        "",
        *table(
            ["width", "images", "ratio of times", "with Python in every update", "ours, ms", "by hand, ms"],
            [
                [r["width"], r["batch"], spread(r["ratio"]), spread(r["ratio_with_python_in_every_update"])]
                + [spread(r["contenders"][name]["milliseconds"]) for name in (OURS, HAND)]
                for r in rows
            ],
        ),
        "## Against re-encoding every read, with a second encoder for keys",
        "",
        "How many times faster ours is. The other has a memory of its own for every query. Ours with one memory",
        "for all queries solves a smaller problem (|M| encodings instead of |M| times the number of images); with",
        "a memory per query the same one. Twice each: with our networks as they are, and in torch's default",
        "layout of images, which the public code has.",
        "",
        *table(
            ["width", "images", "ours", "same layout", "default layout", "counted"],
            [
                [r["width"], r["batch"], what]
                + [spread(r["speedup"][mine][theirs]) for theirs in (REENCODING, PUBLIC)]
                + [f"{r['speedup'][mine]['counted']:.2f}"]
                for r in rows
                for mine, what in ((OURS, "one memory"), (OWN, "a memory per query"))
            ],
        ),
        "Counted: the ratio of floating-point operations per update. What is measured differs from it because the",
        "two spend them on different shapes: the other's convolutions over a thousand entries at once reach a",
        "higher share of the rate of matrix products than ours over a few dozen, most of all in narrow networks",
        "(the shares are below); and what is not a convolution (the likelihood, reading the memory, Adam) is",
        "counted as nothing and takes as long for both. With a memory per query, what is saved is the second",
        "encoding of the entries that are read: a tenth of the operations.",
        "",
        "## All",
        "",
    ]
    for r in rows:
        shown = [
            [
                name,
                spread(c["milliseconds"]),
                f"{c['images_per_second']:.0f}",
                f"{c['forward_gflop'] / 2:.2f}",
                f"{c['update_gflop']:.1f}",
                *(f"{100 * c['gflop_per_second'] / rate:.0f} %" for rate in rates.values()),
                "" if c["peak_gib"] is None else f"{c['peak_gib']:.2f}",
            ]
            for name, c in r["contenders"].items()
        ]
        head = ["", "ms", "images/s", "forward GMAC", "GFLOP", *(f"of a {name}" for name in rates), "peak GiB"]
        lines += [f"Width {r['width']:g}, {r['batch']} images:", "", *table(head, shown)]
    return [*lines, "![Images per second](step.png)"]


def spread(values: dict[str, float]) -> str:
    """Median, and the quartiles behind it."""
    return str(Spread(**values))  # type: ignore[arg-type]


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Images per second of each."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(rows[0]["contenders"])
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(names):
        values = [r["contenders"][name]["images_per_second"] for r in rows]
        axes.bar([j + 0.1 * i for j in range(len(rows))], values, 0.09, label=name)
    axes.set_xticks(
        [j + 0.05 * (len(names) - 1) for j in range(len(rows))],
        [f"width {r['width']:g}\n{r['batch']} images" for r in rows],
    )
    axes.set(ylabel="training images per second", yscale="log")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
