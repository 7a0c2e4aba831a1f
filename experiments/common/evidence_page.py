"""The page of programs whose log evidence is known: how near estimators bring a guide to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean

UNTRAINED = "(untrained)"
NATS, SHARE = 0.1, 0.01  # a program is learned if its tightest bound is within either of the reference

# Why the guide may fall short under an objective, whatever the noise of its gradient.
WHY = {
    "exact": "q of the summed sites is not in this objective and stays as it began",
    "distinct": "q of the site is in this bound only through the choice of values, and learns little from it",
    "relaxed": "biased: what it trains is a program that reads weights in the place of values",
    "wake-sleep": "follows another divergence, not the bound",
    "tvo": "follows a bound of its own",
}
NOT_YET = "unbiased or nearly, and not there after so many runs of the model"


class EvidencePage(NamedTuple):
    """The parts of the page.

    Attributes:
        few: samples of the bound by which rows are ordered.
        samples: of the tightest bound.
    """

    few: int
    samples: int

    def summary(self, programs: Sequence[dict[str, Any]]) -> str:
        """One line for each program."""
        lines = []
        for program in programs:
            evidence, (untrained, *rows) = program["evidence"], program["rows"]
            ran = [row for row in rows if "refused" not in row]
            near = [row for row in ran if gap_of(row, "bound", evidence).mean <= NATS]
            before = shown(gap_of(untrained, "bound", evidence))
            lines.append(
                [program["program"], f"{evidence['mean']:.4f}", before, len(near), len(ran), len(rows) - len(ran)]
            )
        head = ["program", "log p(data)", f"untrained gap of {self.samples:,}", f"within {NATS:g}", "of", "refuse"]
        return table(head, lines)

    def section(self, program: dict[str, Any]) -> list[str]:
        """The part of the page about one program."""
        evidence = program["evidence"]
        ran = [row for row in program["rows"] if "refused" not in row]
        trained = sorted(
            (row for row in ran if row["estimator"] != UNTRAINED),
            key=lambda row: gap_of(row, "few", evidence).mean,
        )
        lines = []
        for row in [*(row for row in ran if row["estimator"] == UNTRAINED), *trained]:
            cost = [f"{row[key]:.4g}" if key in row else "" for key in ("evaluations", "updates", "seconds")]
            gaps = [gap_of(row, key, evidence) for key in ("elbo", "few", "bound")]
            within = "yes" if gaps[-1].mean <= NATS else "1 %" if is_learned(row, evidence) else "no"
            lines.append(
                [
                    row["estimator"],
                    row.get("objective", ""),
                    *cost,
                    Mean.read(row["bound"]),
                    *map(shown, gaps),
                    within,
                ]
            )
        head = ["estimator", "objective", "runs an update", "updates", "seconds", f"bound of {self.samples:,}"]
        head += ["gap of the ELBO", f"of {self.few}", f"of {self.samples:,}", f"within {NATS:g}"]
        near = [row for row in trained if gap_of(row, "bound", evidence).mean <= NATS]
        error = f" ± {evidence['se']:.4f}" if evidence["se"] else " (exact)"
        about = (
            f"{program['about']} log p(data) = {evidence['mean']:.4f}{error} nats: {program['how']}. "
            f"{len(near)} of {len(trained)} estimators that run bring the bound of {self.samples:,} samples "
            f"within {NATS:g} nat of it."
        )
        return [f"## {program['program']}", about, table(head, lines), *shortfalls(trained, program)]


def shortfalls(trained: Sequence[dict[str, Any]], program: dict[str, Any]) -> list[str]:
    """Who is not near, and why; and who refuses, with the line in which it does."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in trained:
        if gap_of(row, "bound", program["evidence"]).mean > NATS:
            reasons[WHY.get(row["objective"], NOT_YET)].append(row["estimator"])
    for row in program["rows"]:
        if "refused" in row:
            reasons[f"refused: {row['refused']}"].append(row["estimator"])
    return [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]


def gap_of(row: dict[str, Any], bound: str, evidence: dict[str, float]) -> Mean:
    """How far a bound is below the reference; its error is that of both."""
    found = Mean.read(row[bound])
    return Mean(evidence["mean"] - found.mean, math.hypot(found.se, evidence["se"]), found.n)


def is_learned(row: dict[str, Any], evidence: dict[str, float]) -> bool:
    """Tell whether the tightest bound is near enough."""
    return gap_of(row, "bound", evidence).mean <= max(NATS, SHARE * abs(evidence["mean"]))


def shown(gap: Mean) -> str:
    """A gap in nats; a guide that hardly ever draws some value may be any number of nats off there."""
    return str(gap) if abs(gap.mean) < 1000 else f"{gap.mean:.1e} ± {gap.se:.1e}"
