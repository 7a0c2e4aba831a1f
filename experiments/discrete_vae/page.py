"""What the figures of all runs say, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from discrete_vae.findings import Group, Line, Run, grouped, ranks, shown, verdict
from discrete_vae.images import Images
from discrete_vae.programs import ARCHITECTURES
from discrete_vae.published import CLAIMS, OVERFITTING, TABLES, Claim, Table
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean

REFERENCE = ("rloo", 2)  # differences are to it

PROTOCOL = (
    "Nats per image. Images are binary already: prepared files have them so, and nothing is redrawn from grey "
    "values during training as it is in the papers. So rankings and gaps between estimators compare, and absolute "
    "values do not. All images are mixed by a fixed seed before they are split, so the sets are of the papers' "
    "sizes but not the papers' own. Every estimator starts from the same weights and sees the same batches, per "
    "seed; ± is one standard error over seeds, and differences are seed by seed. Two seeds give an error that is "
    "itself known badly. "
    "Runs of the model are per image and update; equal ones are the fair comparison. ELBOs of the training and of "
    "the validation set are of the same images in all runs, one sample each, and bounds of fewer images, 100 "
    "samples each (sizes: the options' defaults); test images are scored once, at the end. Milliseconds are of "
    "the runs as they were, beside whatever else the machine did; `binary_step` compares costs."
)
CATEGORICAL = (
    "Categorical models are trained with the plain sampled bound, also where the papers put the KL in closed "
    "form; their prior is uniform."
)


def page(runs: Sequence[Run], variances: Sequence[dict[str, Any]]) -> list[str]:
    """All of the page, but for its title."""
    groups = grouped(runs)
    parts = [PROTOCOL]
    if any(ARCHITECTURES[group.model].values > 2 for group in groups):
        parts.append(CATEGORICAL)
    parts += ["## What the papers claim", claims(groups), *why_not(groups, variances)]
    parts.append("## Published tables beside ours")
    parts += [part for found in TABLES for part in beside(found, groups)] + [OVERFITTING]
    for group in groups:
        parts += [f"## {group.data}, {group.model}"]
        for updates in group.lengths():
            parts += [f"After {updates:,} updates, by runs of the model per update:", ours(group, updates)]
        parts += ["At the end of each run:", ends(group)]
    if variances:
        parts += [
            "## Variance of gradients along one trajectory",
            *(part for v in variances for part in variance(v)),
        ]
    return parts


class Compared(NamedTuple):
    """A claim in one of our comparisons."""

    claim: Claim
    group: Group
    updates: int
    difference: Mean | None  # None: no seed in both

    @property
    def where(self) -> str:
        """Name data, model and length."""
        return f"{self.group.data}, {self.group.model}, {self.updates:,} updates"


def compared(groups: Sequence[Group]) -> list[Compared]:
    """Find all claims that can be looked at in our runs."""
    rows = []
    for claim in CLAIMS:
        column = "train_bound" if claim.bound else "train_elbo"
        for group in groups:
            for updates in group.lengths():
                better, worse = (group.find(entry, updates) for entry in (claim.better, claim.worse))
                if better is not None and worse is not None:
                    rows.append(Compared(claim, group, updates, better.minus(worse, column, updates)))
    return rows


def claims(groups: Sequence[Group]) -> str:
    """Which ranking of the papers holds in which of our comparisons."""
    rows = [
        [row.claim.source, *map(_label, row.claim[1:3]), row.where, shown(row.difference), verdict(row.difference)]
        for row in compared(groups)
    ]
    if not rows:
        return "None of these comparisons has been run yet."
    return table(["source", "better", "than", "here", "by, nats in training", "ranking"], rows)


def why_not(groups: Sequence[Group], variances: Sequence[dict[str, Any]]) -> list[str]:
    """What the variances along a trajectory say of rankings that are not agreed."""
    lines = []
    for row in compared(groups):
        if not verdict(row.difference).startswith("not agreed"):
            continue
        for found in variances:
            ratios = _ratios(found, row)
            if ratios:
                better, worse = _label(row.claim.better), _label(row.claim.worse)
                lines.append(
                    f"Not agreed, {row.where}: along the trajectory below the gradient of the guide by {better} "
                    f"has {', '.join(ratios)} times the variance of that by {worse}."
                )
    return lines


def _ratios(found: dict[str, Any], row: Compared) -> list[str]:
    """How many times the variance of the one that should be worse the better one has, at each point."""
    if (found["data"], found["model"]) != (row.group.data, row.group.model):
        return []
    at = {(r["estimator"], r["num_particles"], r["update"]): r["guide"]["variance"] for r in found["rows"]}
    ratios = []
    for update in sorted({r["update"] for r in found["rows"]}):
        pair = [at.get((*entry, update)) for entry in (row.claim.better, row.claim.worse)]
        if pair[0] is not None and pair[1]:
            ratios.append(f"at update {update:,} {pair[0] / pair[1]:.2g}")
    return ratios


def _label(entry: tuple[str, int]) -> str:
    return f"{entry[0]}, K = {entry[1]}"


def beside(published: Table, groups: Sequence[Group]) -> list[str]:
    """A published table with our figures beside it, at our longest common length; nothing if we have no two."""
    for group in groups:
        if (group.data, group.model) != (published.data, published.model):
            continue
        for updates in reversed(group.lengths()):
            found = {entry: group.find(entry, updates) for entry in published.values}
            lines = {entry: line for entry, line in found.items() if line is not None}
            if len(lines) > 1:
                return _beside(published, lines, updates)
    return []


def _beside(published: Table, lines: dict[tuple[str, int], Line], updates: int) -> list[str]:
    """The table, and how many pairs of its rows are ranked alike."""
    entries = list(lines)
    theirs = [published.values[entry][0] for entry in entries]
    ours_ = [lines[entry].mean("train_elbo", updates) for entry in entries]
    rows = []
    for entry, value, their_rank, our_rank in zip(
        entries, ours_, ranks(theirs), ranks([mean.mean for mean in ours_]), strict=True
    ):
        mean, error = published.values[entry]
        cell = f"{mean:g}" if error is None else f"{mean:g} ± {error:g}"
        rows.append(
            [f"{entry[0]}, K = {entry[1]}", cell, shown(value), len(lines[entry].runs), their_rank, our_rank]
        )
    told = {"agreed": 0, "not agreed": 0, "undecided": 0}
    for i, better in enumerate(entries):
        for j, worse in enumerate(entries):
            if theirs[i] > theirs[j]:
                said = verdict(lines[better].minus(lines[worse], "train_elbo", updates)).removesuffix(", one seed")
                told[said] = told.get(said, 0) + 1
    head = [
        "",
        "published" + (" (recalled)" if published.recalled else ""),
        "ours",
        "seeds",
        "their rank",
        "our rank",
    ]
    counts = ", ".join(f"{number} {name}" for name, number in told.items() if number)
    remark = f" {published.remark}" if published.remark else ""
    source = "written down from memory" if published.recalled else "read in the paper's source"
    about = (
        f"### {published.title}",
        f"Training ELBO; theirs {source}, ours after {updates:,} updates.{remark} Rankings of two rows, beyond "
        f"two standard errors of ours: {counts}.",
    )
    return [*about, table(head, rows)]


def ours(group: Group, updates: int) -> str:
    """All estimators after so many updates, in groups of equal runs of the model."""
    reference = group.find(REFERENCE, updates)
    rows = []
    for line in sorted(group.after(updates), key=lambda line: line.first.evaluations):
        first = line.first
        less = None if reference is None else line.minus(reference, "train_elbo", updates)
        columns = ("train_elbo", "validation_elbo", "train_bound", "validation_bound")
        figures = [shown(line.mean(column, updates)) for column in columns]
        bias = "yes" if first.unbiased else "no"
        cost = f"{max(run.milliseconds for run in line.runs):.1f}"
        seeds = len(line.by_seed("train_elbo", updates))
        rows.append(
            [f"{first.evaluations:.3g}", first.label, first.objective, bias, seeds, *figures, shown(less), cost]
        )
    head = ["runs of the model", "estimator", "objective", "unbiased", "seeds"]
    head += ["ELBO, training", "validation", "bound, training", "validation"]
    return table([*head, f"ELBO, training, over {REFERENCE[0]}, K = {REFERENCE[1]}", "ms per update"], rows)


def ends(group: Group) -> str:
    """The scores at the end of each run."""
    rows = []
    for line in group.lines:
        if line.score("test", "elbo") is None:
            continue
        updates = ", ".join(sorted({f"{run.updates:,}" for run in line.runs if run.scores}))
        cells = [shown(line.score(part, what)) for what in ("elbo", "bound") for part in Images._fields]
        rows.append([line.first.label, updates, *cells])
    return table(["estimator", "updates", *(f"{w}, {p}" for w in ("ELBO", "bound") for p in Images._fields)], rows)


def variance(found: dict[str, Any]) -> list[str]:
    """The variance of each estimator's gradient at points of one run, and how large the gradient itself is."""
    stages = sorted({row["update"] for row in found["rows"]})
    names = list(dict.fromkeys((row["estimator"], row["num_particles"]) for row in found["rows"]))
    about = (
        f"{found['data']}, {found['model']}: along a run of {found['trajectory']} (K = "
        f"{found['trajectory_particles']}, seed {found['seed']}), on one batch; {found['draws']} gradients each, "
        "mean over parameters of the variance, times 1e6. Variances of different objectives do not compare, and a "
        "biased estimator is not better for a small one. Control variates that learn have seen "
        f"{found['warm_up']} gradients at the point before. ± is one standard error over draws."
    )
    parts = [about]
    for part in ("guide", "model"):
        rows = []
        for estimator, k in names:
            own = {r["update"]: r for r in found["rows"] if (r["estimator"], r["num_particles"]) == (estimator, k)}
            cells = [
                f"{1e6 * own[u][part]['variance']:.3g} ± {1e6 * own[u][part]['se']:.2g}" if u in own else ""
                for u in stages
            ]
            facts = next(iter(own.values()))
            told = [facts["objective"], "yes" if facts["unbiased"] else "no", f"{facts['evaluations']:.3g}"]
            rows.append([f"{estimator}, K = {k}", *told, *cells])
        head = [part, "objective", "unbiased", "runs of the model"]
        parts.append(table([*head, *(f"update {u:,}" for u in stages)], rows))
    return parts
