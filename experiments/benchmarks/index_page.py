"""What the figures of `index.py` say, and an estimate for a memory that no machine here holds."""

from __future__ import annotations

import math
from typing import Any

import torch

from common.timing import Spread
from vma_pyro._system.markdown import table

Rows = list[dict[str, Any]]
HUGE = 10**9  # entries of the estimate
SHARES = (1, 16, 64)  # processes that hold them together
LEARNED = 64 * 10  # keys that a centroid is learned from, times rounds: what learning costs beside sorting
IMAGE = 784  # bytes


def page(content: dict[str, Any], k: int) -> list[str]:
    """All of the page."""
    rows, about, options = content["rows"], content["about"], content["options"]
    embedding = Spread.of([each["embedding"]["median"] for row in rows for each in row["probed"]])
    return [
        f"Published model, {options['data']}, one thread; times are of the processor ('s waited': by the clock, "
        f"on a machine that others used too). {about['images']:,} images are encoded; every further entry repeats "
        f"one of them, its key moved as a small distortion moves that of some image: by "
        f"{about['degrees_moved']:.0f} "
        f"degrees in the median, where keys of two images are {about['degrees_apart']:.0f} degrees apart. So "
        f"recall and times are of keys like real ones, not of {max(r['memory'] for r in rows):,} real images. "
        f"q(a | x) is the softmax of {about['scale']:.1f} times the cosine. {options['queries']} queries, images "
        "that are not in the memory. A query's time is that of the search; its key costs another "
        f"{embedding.median:.0f} ms ({embedding.low:.0f} to {embedding.high:.0f}) in the networks, whatever |M|.",
        "## What an index finds, and what it costs",
        f"Recall: of the exact top {k}. Mass lost: minus the mean log of what exact q(a | x) gives to the support "
        "(1,024 entries), in nats: the bound lost if q were the posterior. Bound lost: exact float32 minus this, "
        f"nats per image, mean and standard error over {options['bounds']} images, of the sum over the top "
        f"{options['top']} entries with {options['num_samples']} z each, and of as many draws from q(a | x); the "
        "draws differ, so the latter is noisy, and above or below zero by chance where no mass is lost. Lists "
        "keep no other keys unless it is said. Bytes an entry: of keys, codes, addresses and p(a | M); an image "
        f"of {IMAGE} bytes stands in the file beside it.",
        costs(rows, options["nprobe"][1]),
        "## Lists looked into",
        "More lists find more and cost more; the default is "
        f"{options['nprobe'][1]}. Lists here: {', '.join(f'{n:,}' for n in options['nlist'])}; where nothing is "
        "said the package takes the largest power of two up to the root of |M|. Mass that more lists do not bring "
        "back is lost to the size of the support; a larger `support` does.",
        probes(rows),
        f"## On paper: {HUGE:,} entries",
        "**An estimate, not a measurement**: a query costs a + b nlist + c nprobe |M| / nlist, building "
        "w + u |M| + v nlist (|M| + 640 nlist); b and v are the same for both kinds of lists, w is 0 without "
        "codes. Fitted to the rows above, of which none has more than "
        f"{max(options['nlist']):,} lists (so b is the least certain), and shared out. Nothing of the network "
        "between the processes is in it (12 bytes per entry of the support from each, once a query). "
        f"{lists_of(HUGE):,} lists.",
        on_paper(rows),
    ]


def costs(rows: Rows, nprobe: int) -> str:
    """The first table."""
    exact = {row["memory"]: row for row in rows if row["kind"] == "exact, float32"}
    cells = []
    for row in sorted(rows, key=lambda row: row["memory"]):
        (probed,) = [each for each in row["probed"] if each.get("nprobe", nprobe) == nprobe]
        mass = probed.get("log_mass")
        is_reference = row is exact[row["memory"]]
        lost = [
            "0" if is_reference else difference(exact[row["memory"]][name], row[name])
            for name in ("bound", "sampled_bound")
        ]
        cells.append(
            [f"{row['memory']:,}", row["kind"], f"{100 * probed['recall']['mean']:.1f} %"]
            + [Spread.read(probed["one_query"]), f"{probed['each_of_many']['median']:.3g}"]
            + [f"{row['bytes']:.0f}", "0" if mass is None else f"{abs(mass):.3f}", *lost]
            + [f"{row['build_seconds']:.1f} ({row['build_wall']:.0f})", f"{row['peak_gib']:.2f}"]
        )
    head = ["|M|", "index", "recall", "ms, one query", "ms each, all at once", "bytes an entry", "mass lost"]
    head += ["bound lost, top", "bound lost, drawn", "s to build (s waited)", "peak GiB so far"]
    return table(head, cells)


def difference(expected: list[float], actual: list[float]) -> str:
    """Mean of the differences with its standard error."""
    each = torch.tensor(expected, dtype=torch.float64) - torch.tensor(actual, dtype=torch.float64)
    return f"{each.mean().item():.3f} ± {each.std().item() / math.sqrt(len(each)):.3f}"


def probes(rows: Rows) -> str:
    """The second table."""
    cells = [
        [
            f"{row['memory']:,}",
            row["kind"],
            row["nlist"],
            probed["nprobe"],
            f"{100 * probed['recall']['mean']:.1f} %",
        ]
        + [f"{abs(probed['log_mass']):.3f}", Spread.read(probed["one_query"])]
        for row in sorted(rows, key=lambda row: row["memory"])
        if row["nlist"]
        for probed in row["probed"]
    ]
    return table(["|M|", "index", "nlist", "nprobe", "recall", "mass lost", "ms, one query"], cells)


def lists_of(size: int) -> int:
    """How many lists the package takes."""
    return 2 ** int(math.log2(math.sqrt(size)))


def on_paper(rows: Rows) -> str:
    """The third table."""
    kinds = ("lists, half precision", "lists, codes")
    asked, built = [], []
    for which, kind in enumerate(kinds):
        for row in (row for row in rows if row["kind"] == kind):
            size, nlist = row["memory"], row["nlist"]
            built.append((build_units(which, size, nlist), row["build_seconds"]))
            for each in row["probed"]:
                asked.append((query_units(which, size, nlist, each["nprobe"]), each["one_query"]["median"]))
    query, building = fitted(asked), fitted(built)
    cells, nlist = [], lists_of(HUGE)
    for which, kind in enumerate(kinds):
        entry = max((row for row in rows if row["kind"] == kind), key=lambda row: row["memory"])["bytes"]
        for shares in SHARES:
            size = HUGE / shares
            hours = dot(building, build_units(which, size, nlist)) / 3600
            times = [f"{dot(query, query_units(which, size, nlist, nprobe)):.0f}" for nprobe in (16, 64)]
            images = f"{IMAGE * size / 2**30:.0f}"
            cells.append([kind, shares, f"{entry * size / 2**30:.1f}", images, *times, f"{hours:.1f}"])
    head = ["index", "processes", "GiB of memory each", "GiB of images each, in files"]
    return table([*head, "ms, 16 lists", "ms, 64 lists", "hours to build, keys at hand"], cells)


def query_units(which: int, size: float, nlist: int, nprobe: int) -> list[float]:
    """A query of each kind, keys of each kind looked at, and centroids."""
    scanned = nprobe * size / nlist
    return [which == 0, which == 1, scanned * (which == 0), scanned * (which == 1), nlist]


def build_units(which: int, size: float, nlist: int) -> list[float]:
    """Keys of each kind, codebooks, and products of keys and centroids."""
    return [size * (which == 0), size * (which == 1), which == 1, nlist * (size + LEARNED * nlist)]


def fitted(points: list[tuple[list[float], float]]) -> list[float]:
    """Costs per unit, by least squares of relative errors; none below 0."""
    units, cost = (torch.tensor(each, dtype=torch.float64) for each in zip(*points, strict=True))
    scale = (units / cost[:, None]).abs().max(0).values
    a = units / cost[:, None] / scale
    found = torch.zeros(a.shape[1], dtype=torch.float64)
    for _ in range(10_000):  # projected gradient: five unknowns
        found = (found - a.T @ (a @ found - 1) / (a * a).sum()).clamp(min=0)
    return (found / scale).tolist()


def dot(costs: list[float], units: list[float]) -> float:
    """What so many units cost."""
    return sum(cost * unit for cost, unit in zip(costs, units, strict=True))
