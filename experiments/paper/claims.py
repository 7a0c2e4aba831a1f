"""The paper's claims beside what was measured here.

Everything is read from the results of the experiments, by name: `{"table1": {...}, "kl_split": {...}, ...}`. What
has not been run yet has no row's figure and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from common import results
from paper import published
from paper.verdicts import Claim, Results, describe_training, readable, verdict, verdict_against, verdict_on_growth
from vma_pyro.evaluation import Mean

Judge = Callable[[dict[str, Any]], Iterator[Claim]]


def claims(found: Results) -> list[Claim]:
    """Judge all claims, in the order of the paper."""
    rows: list[Claim] = []
    for name, make in CLAIMS:
        if name in found:
            with readable(name):
                judged = list(make(found[name]))
            rows += with_causal(judged, make, found.get(f"{name}_causal"), f"{name}_causal")
        else:
            rows.append(Claim(str(make.__doc__).splitlines()[0].rstrip("."), "", "", "", "not measured", name))
    return rows


def with_causal(rows: list[Claim], make: Judge, content: dict[str, Any] | None, name: str) -> list[Claim]:
    """The same claims with the figures of a model with the causal likelihood, where that was measured."""
    if content is None:
        return rows
    with readable(name):
        others = {claim.claim: claim.ours for claim in make(content)}
    return [claim._replace(causal=others.get(claim.claim, "")) for claim in rows]


def recall(content: dict[str, Any]) -> Iterator[Claim]:
    """Recall on MNIST with the target in memory: KL(a) and the bound go to log |M|, without annealing."""
    for row in content["tests"]:
        kl, nll, z = (Mean.read(row[name]) for name in ("kl_address", "nll", "kl_z"))
        most = 0.3 if row["images"] == "training" else 0.5  # nats
        off = [abs(value.mean - row["log_memory"]) for value in (kl, nll)]
        near = off[0] < 0.1 and off[1] < most and z.mean < 0.5
        yield Claim(
            f"Recall among {row['memory']} {row['images']} MNIST images: KL(a) = -bound = log |M|",
            f"{row['log_memory']:.2f} nats",
            "",
            f"KL(a) {kl}, KL(z) {z}, NLL {nll}",
            verdict(reached=near, short=f"KL(a) {off[0]:.2f} and NLL {off[1]:.2f} nats off"),
            "mnist_recall",
            headline=row is content["tests"][-1],
        )


def recall_as_well(name: str, what: str) -> Judge:
    """Judge recall after another training: of its own images, and of the most unseen ones."""

    def judge(content: dict[str, Any]) -> Iterator[Claim]:
        own, *_, unseen = recall(content)
        for claim in (own, unseen):
            yield claim._replace(claim=f"{claim.claim}; {what}", source=name, headline=False)

    judge.__doc__ = f"Recall on MNIST; {what}"
    return judge


def annealing(content: dict[str, Any]) -> Iterator[Claim]:
    """No annealing is needed."""
    plain, annealed = (Mean.read(row["nll"]) for row in content["rows"])
    worse = Mean.read(content["worse_without"])
    last = [[line["kl_address"] for line in row["curve"] if "kl_address" in line][-1] for row in content["rows"]]
    yield Claim(
        "No annealing needed: KL(a) is learned, and a temperature schedule does not help",
        "none used",
        "",
        f"KL(a) {last[0]:.2f} nats and NLL {plain} without; {last[1]:.2f} and {annealed} with",
        verdict(reached=worse.mean < 2 * worse.se, short=f"{worse} nats worse without"),
        "annealing",
    )


def data(content: dict[str, Any]) -> Iterator[Claim]:
    """KL(a) is lower on MNIST and higher on Omniglot at the same |M|."""
    kl = {row["data"]: Mean.read(row["kl_address"]) for row in content["comparison"]}
    more, error = kl["omniglot"].mean - kl["mnist"].mean, math.hypot(kl["omniglot"].se, kl["mnist"].se)
    yield Claim(
        "KL(a) lower on MNIST, higher on Omniglot, at the same |M|",
        "lower",
        "",
        f"{kl['mnist']} on MNIST, {kl['omniglot']} on Omniglot, nats",
        verdict(reached=more > 2 * error, short=f"{more:.2f} ± {error:.2f} higher"),
        "mnist_mixture",
    )


def split(content: dict[str, Any]) -> Iterator[Claim]:
    """More examples per class: KL(a) rises, KL(z) and NLL fall."""
    first, last = content["rows"][0], content["rows"][-1]
    for name, label, sign in (("kl_address", "KL(a)", 1), ("kl_z", "KL(z)", -1), ("nll", "NLL", -1)):
        before, after = (Mean.read(row[name]) for row in (first, last))
        change, error = after.mean - before.mean, math.hypot(after.se, before.se)
        paper = published.VMA_SPLIT[name]
        yield Claim(
            f"{first['shots']} to {last['shots']} examples per class: {label} {'rises' if sign > 0 else 'falls'}",
            f"{paper[0]} to {paper[1]} nats (recalled)",
            "",
            f"{before} to {after} nats",
            verdict(reached=sign * change > 2 * error, short=f"changes by {change:.2f} ± {error:.2f}"),
            "kl_split",
            headline=name == "kl_address",
        )


def table(content: dict[str, Any]) -> Iterator[Claim]:
    """Compare the NLL of Table 1."""
    cells = {
        (row["counting"], row["classes"], row["shots"]): Mean.read(row["nll"])
        for row in content["rows"]
        if row["address"] == "sampled"
    }
    for classes, figures in published.VMA_NLL.items():
        for shots, paper in zip(published.SHOTS, figures, strict=True):
            ours = cells.get(("shots per class", classes, shots))
            if ours is None:
                continue
            total = "shots per class" if classes == 1 else "images in all"
            other = dict(zip(published.SHOTS, published.REIMPLEMENTATION_NLL.get(classes, ()), strict=False))
            same = cells.get((total, classes, shots))
            again = "" if same is None or classes == 1 else f"; {same} by images in all"
            yield Claim(
                f"NLL, C = {classes}, {results.plural(shots, 'shot')}",
                f"{paper}{' (recalled)' if ('VMA', classes) in published.RECALLED else ''}",
                f"{other[shots]} (26 x 26)" if shots in other else "",
                f"{ours}{again}",
                verdict_against(ours, paper, how=describe_training(content)),
                "table1",
                headline=(classes, shots) == (1, 1),
            )
    artefact = cells.get(("images in all, with replacement", 1, 19))
    honest = cells.get(("shots per class", 1, 19))
    if artefact is not None and honest is not None:
        worth = honest.mean - artefact.mean
        yield Claim(
            "GMN's sampler draws the target itself into its memory: worth at 19 shots",
            "not said",
            "",
            f"{worth:.2f} nats ({artefact} instead of {honest})",
            verdict(reached=worth > 0, short="none"),
            "table1",
        )


def size(content: dict[str, Any]) -> Iterator[Claim]:
    """Trained with 32 entries, tested with thousands: NLL follows L_1 + log C."""
    largest = max(row["entries"] for row in content["rows"] if row["model"] == "hard")
    for row in content["rows"]:
        if row["model"] != "hard" or row["entries"] < 500:
            continue
        over = Mean.read(row["excess"])
        nll = Mean.read(row["nll"])
        yield Claim(
            f"{row['entries']:,} entries ({row['classes']} classes) after tens in training: NLL = L_1 + log C "
            "at most",
            "follows the line",
            "",
            f"{nll} nats, {over} over the line",
            verdict(reached=over.mean < 2 * over.se, short=f"{over.mean:.2f} ± {over.se:.2f} above"),
            "memory_size",
            headline=row["entries"] == largest,
        )


def classification(content: dict[str, Any]) -> Iterator[Claim]:
    """Compare few-shot classification from q(a | x)."""
    for row in content["rows"]:
        if (row["by"], row["among"]) != ("guide", "all alphabets"):
            continue
        paper = published.VMA_ACCURACY.get((row["ways"], row["shots"]))
        share = Mean.read(row["accuracy"])
        reached = "measured"
        if paper is not None:
            reached = verdict_against(share, paper, how=describe_training(content), higher=True)
        yield Claim(
            f"{row['ways']}-way {row['shots']}-shot by q(a|x)",
            "" if paper is None else f"{100 * paper:.0f} % (recalled)",
            "",
            f"{results.percent(share)} %",
            reached,
            "classification",
            headline=(row["ways"], row["shots"]) == (20, 1),
        )


def soft(content: dict[str, Any]) -> Iterator[Claim]:
    """Discrete addressing beats soft attention, the more so the more distractors there are."""
    rows = [row for row in content["nll"] if row["model"].startswith("soft")]
    for model, shots in dict.fromkeys((row["model"], row["shots"]) for row in rows):
        gaps = {
            row["classes"]: Mean.read(row["more_than_hard"])
            for row in rows
            if (row["model"], row["shots"]) == (model, shots) and row["classes"] > 1
        }
        yield Claim(
            f"NLL of {soft_name(model)} over hard's, the more classes C the more ({shots} of each)",
            "grows beyond 4 classes",
            "",
            "; ".join(f"C = {c}: {gap.mean:+.2f} ± {gap.se:.2f}" for c, gap in gaps.items()) + " nats",
            verdict_on_growth(gaps),
            "soft_attention",
            headline=shots == rows[-1]["shots"],
        )
    share = {(r["model"], r["ways"], r["shots"]): Mean.read(r["accuracy"]) for r in content["accuracy"]}
    gaps = {}
    for ways in sorted({ways for _, ways, shots in share if shots == 1}):
        hard, other = share["hard", ways, 1], share["soft", ways, 1]
        # As if the images were not the same: the error is rather too large than too small.
        gaps[ways] = Mean(100 * (hard.mean - other.mean), 100 * math.hypot(hard.se, other.se), hard.n)
    yield Claim(
        "1-shot classification by hard attention over soft, the more classes the more",
        "grows beyond 4 classes",
        "",
        "; ".join(f"{ways}-way: {gap.mean:+.1f} ± {gap.se:.1f}" for ways, gap in gaps.items()) + " %",
        verdict_on_growth(gaps),
        "soft_attention",
        headline=True,
    )


def soft_name(model: str) -> str:
    """Name a soft program in words: "soft attention", "target-guided soft attention"."""
    kind, _, how = model.partition(", ")
    return f"{how} {kind} attention".strip()


def crossing(content: dict[str, Any]) -> Iterator[Claim]:
    """An update with hard attention is cheaper than with soft from |M| = 48 on."""
    ratios = {row["memory"]: row["soft_over_hard"]["median"] for row in content["rows"]}
    cheaper = [size for size in ratios if all(r > 1 for s, r in ratios.items() if s >= size)]
    yield Claim(
        "An update with hard attention is cheaper than with soft, from |M| on",
        str(published.VMA_CROSSING),
        "",
        (f"{min(cheaper)} (soft over hard: " if cheaper else "never (soft over hard: ")
        + ", ".join(f"{size}: {r:.2f}" for size, r in ratios.items())
        + ")",
        verdict(reached=bool(cheaper) and min(cheaper) <= published.VMA_CROSSING, short="later"),
        "benchmarks/attention",
        headline=True,
    )


RECALLS = {
    "mnist_recall_512": "trained with 512 in memory, all encoded",
    "mnist_recall_512_found": "trained with 512 in memory, 256 encoded",
    "mnist_recall_4096": "trained with 4,096 in memory, 512 encoded",
    "mnist_recall_10000": "trained with 10,000 in memory, 512 encoded",
    "mnist_recall_60000": "trained with 60,000 in memory, 512 encoded",
}
CLAIMS: tuple[tuple[str, Judge], ...] = (
    ("mnist_recall", recall),
    *((name, recall_as_well(name, what)) for name, what in RECALLS.items()),
    ("annealing", annealing),
    ("mnist_mixture", data),
    ("kl_split", split),
    ("memory_size", size),
    ("table1", table),
    ("classification", classification),
    ("soft_attention", soft),
    ("benchmarks/attention", crossing),
)
