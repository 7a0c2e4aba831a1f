"""The laboratory's page: what its figures say about which estimator to choose when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from laboratory.records import ADDRESS, JUDGE, Quality, Training
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Estimate
from vma_pyro.infer import Row, fit_slope


class Findings(NamedTuple):
    """All that was measured.

    Attributes:
        command: that repeats it.
        about: lines on data, sizes, budgets, seed and versions.
        stages: tables of all estimators, one for each program and stage.
        particles: tables of some estimators for growing budgets.
        memories: tables of some estimators for several |M|.
        training: one run per estimator, of equal numbers of decoder evaluations; the first is VIMCO's.
        final: VIMCO's for longer, and the best of the others in half of its time.
    """

    command: str
    about: tuple[str, ...]
    stages: tuple[Quality, ...]
    particles: tuple[Quality, ...]
    memories: tuple[Quality, ...]
    training: tuple[Training, ...]
    final: tuple[Training, ...]


def to_markdown(found: Findings) -> str:
    """The whole page."""
    parts = [
        "# Which gradient estimator, and when",
        "",
        f"`{found.command}`",
        "",
        *found.about,
        "",
        "## In short",
        "",
        *address_answers(found),
        *memory_answers(found.memories),
        *particle_answers(found.particles),
        *training_answers(found),
        "",
        "## Training",
        "",
        "Behind each name: particles, images per update, learning rate. A run of the model without a graph counts",
        "as a third of one, as a backward pass takes twice the operations of a forward pass.",
        "",
        training_table(found.training),
        "",
        "![Validation NLL and KL(a) against updates and seconds](training.png)",
        "",
        "## The final: VIMCO, and the best of the others in half of its time",
        "",
        "Half of the time is a number of updates, from updates of both timed in turns; the seconds are by the",
        "clock, with whatever else the machine was doing.",
        "",
        *(line for final in by_length(found.final) for line in final_table(final)),
        "![Validation NLL and KL(a) against updates and seconds](final.png)",
        "",
        "## The address: variance x time, in units of VIMCO's",
        "",
        "Below 1 is better than VIMCO with the same number of runs of the model. VIMCO follows the K-sample",
        "bound; the objective of those that follow another one stands in brackets. Variance is relative to the",
        "squared length of the objective's own gradient: one whose gradient is long (`distinct`, once q(a|x) has",
        "become sharp) looks good here, and need not train better. What trains best stands under Training.",
        "",
        gain_table(found.stages),
        "",
        "## Particles",
        "",
        *slope_table(found.particles),
        "",
        "![Signal-to-noise ratio of the address against K](slopes.png)",
        "",
        "## Memory size",
        "",
        gain_table(found.memories),
        "",
        "## All figures",
        "",
    ]
    for quality in found.stages:
        parts += [f"## {title(quality)}", "", quality.table.to_markdown()]
    return "\n".join(parts).rstrip() + "\n"


def title(quality: Quality) -> str:
    """Program, stage, |M| and budget."""
    stage = f", {quality.stage} of training" if quality.stage else ""
    return f"{quality.program}{stage}, |M| = {quality.memory}, {quality.evaluations} runs of the model"


def address_answers(found: Findings) -> list[str]:
    """The lowest variance x time on the address at each stage: of the unbiased, of VIMCO's own bound, of all."""
    lines = []
    for quality in found.stages:
        rows = _rows(quality)
        kinds = {
            "": [row for row in rows if row.claims_unbiased],
            "of those that follow the K-sample bound as VIMCO does, ": [
                row for row in rows if row.claims_unbiased and row.objective == BOUND
            ],
            "among the biased, ": [row for row in rows if not row.claims_unbiased],
        }
        answers = [
            f"{kind}**{_named(best)}**, {quality.gain(best.estimator):.3g} times less than VIMCO's"
            for kind, some in kinds.items()
            if some and (best := min(some, key=lambda row: row.variance_time))
        ]
        if answers:
            lines.append(f"- {title(quality)}: lowest variance x time on the address: {'; '.join(answers)}.")
    return lines


def memory_answers(memories: Sequence[Quality]) -> list[str]:
    """The lowest variance x time on the address for each |M|, at the last stage that was measured."""
    lines = []
    for quality in _last_stage(memories):
        rows = [row for row in _rows(quality) if row.claims_unbiased]
        if rows:
            best = min(rows, key=lambda row: row.variance_time)
            gain = quality.gain(best.estimator)
            lines.append(f"|M| = {quality.memory}: {_named(best)}, {gain:.2f} times less than VIMCO's")
    if not lines:
        return []
    names = ", ".join(dict.fromkeys(row.estimator for quality in memories for row in _rows(quality)))
    return [
        f"- Memories of other sizes, {memories[-1].program} {memories[-1].stage}, of {names}: {'; '.join(lines)}."
    ]


def particle_answers(particles: Sequence[Quality]) -> list[str]:
    """The highest signal-to-noise ratio with most runs of the model, at the last stage that was measured."""
    last = _last_stage(particles)
    snr = {name: values[-1] for name, values in snr_of(last).items() if values[-1] > 0} if last else {}
    if not snr:
        return []
    best = max(snr, key=lambda name: snr[name])
    most = max(quality.evaluations for quality in last)
    return [
        f"- Many particles, {last[0].program} {last[0].stage}: with {most} runs of the model the address has the "
        f"highest SNR under {best}: {snr[best]:.3g} (VIMCO: {snr.get(JUDGE, math.nan):.3g})."
    ]


def _last_stage(qualities: Sequence[Quality]) -> list[Quality]:
    groups = list(_by_program(qualities).values())
    return groups[-1] if groups else []


def training_answers(found: Findings) -> list[str]:
    """Which trains fastest, and whether any reaches VIMCO's result in half of its time."""
    judge = found.training[0]
    if not judge.validation or judge.test_nll is None:
        return []
    target = judge.validation[-1][2]
    times = {run.label: run.seconds_to(target) for run in found.training if run.estimator != JUDGE}
    label, seconds = min(times.items(), key=lambda item: item[1], default=("", math.inf))
    lines = [
        f"- {judge.label} ends at a test NLL of {judge.test_nll} nats per image after {judge.seconds:.0f} s; its "
        f"validation NLL is then {target:.2f}."
    ]
    if seconds < math.inf:
        lines.append(
            f"- The first to reach that validation NLL with as many decoder evaluations: **{label}**, after "
            f"{seconds:.0f} s, {judge.seconds / seconds:.2f} times faster."
        )
    else:
        lines.append("- No other estimator reaches that validation NLL with as many decoder evaluations.")
    return [*lines, *(line for final in by_length(found.final) for line in final_answer(final))]


def by_length(final: Sequence[Training]) -> list[list[Training]]:
    """The final's runs, for each length of VIMCO's."""
    lengths = dict.fromkeys(run.final_minutes for run in final)
    return [[run for run in final if run.final_minutes == length] for length in lengths]


def final_answer(final: Sequence[Training]) -> list[str]:
    """Whether any of the others reaches VIMCO's test NLL in half of its time, over all seeds."""
    runs: dict[str, list[Training]] = {}
    for run in final:
        runs.setdefault(run.label, []).append(run)
    (label, judge), *others = runs.items()
    complete = [(name, rival) for name, rival in others if all(run.test_nll for run in rival)]
    if not complete or not all(run.test_nll for run in judge):
        return []
    name, best = min(complete, key=lambda item: _mean_of(item[1]))
    pairs = [run.test_minus_vimco for run in best if run.test_minus_vimco]
    # All seeds have the same images: their errors do not average out.
    difference, error = (sum(getattr(pair, what) for pair in pairs) / len(pairs) for what in ("mean", "se"))
    verdict = "it misses VIMCO's"
    if difference <= 2 * error:
        verdict = (
            "it surpasses VIMCO's" if difference < -2 * error else "it reaches VIMCO's within two standard errors"
        )
    updates, seconds, half = (
        sum(getattr(run, what) for run in of) / len(of)
        for of, what in ((judge, "updates"), (judge, "seconds"), (best, "updates"))
    )
    each = ", ".join(f"{run.test_minus_vimco} (seed {run.seed})" for run in best)
    return [
        f"- The final, {judge[0].final_minutes:g} minutes: {label} has a test NLL of {_mean_of(judge):.2f} nats "
        f"per image after {updates:.0f} updates, {seconds:.0f} s. In half of its time, {half:.0f} updates "
        f"that each take {best[0].update_cost:.2f} times as long (timed in turns), **{name}** has "
        f"{_mean_of(best):.2f}: **{verdict}**. Differences, paired by image: {each}."
    ]


def final_table(final: Sequence[Training]) -> list[str]:
    """Under a heading, the table of each seed."""
    lines = []
    for seed in dict.fromkeys(run.seed for run in final):
        runs = [run for run in final if run.seed == seed]
        lines += [f"### {runs[0].final_minutes:g} minutes, seed {seed}", "", training_table(runs), ""]
    return lines


def training_table(runs: Sequence[Training]) -> str:
    """One line per run, the best test NLL first; the first run is VIMCO's."""
    judge = runs[0]
    target = judge.validation[-1][2] if judge.validation else math.nan
    head = ["estimator", "updates", "runs of the model per image", "seconds", "test NLL, nats"]
    head += ["less VIMCO's, paired", "test KL(a), nats", "seconds to VIMCO's last validation NLL"]
    lines = []
    for run in sorted(runs, key=_mean):
        reached = run.seconds_to(target)
        lines.append(
            [run.label, run.updates, f"{run.evaluations:.3g}", f"{run.seconds:.0f}", run.test_nll or "diverged"]
            + [run.test_minus_vimco or "", run.test_kl_address or ""]
            + [f"{reached:.0f}" if reached < math.inf else "never"]
        )
    return table(head, lines)


def gain_table(qualities: Sequence[Quality]) -> str:
    """Variance x time on the address relative to VIMCO: tables down, estimators across, or the other way round."""
    names = list(dict.fromkeys(row.estimator for quality in qualities for row in _rows(quality)))
    heads = [f"{q.program} {q.stage}".strip() + f", M = {q.memory}" for q in qualities]
    cells = [[_gain(quality, name) for quality in qualities] for name in names]
    if len(names) < len(heads):
        names, heads, cells = heads, names, [list(column) for column in zip(*cells, strict=True)]
    return table(["", *heads], [[name, *row] for name, row in zip(names, cells, strict=True)])


def _gain(quality: Quality, name: str) -> str:
    row = next((r for r in _rows(quality) if r.estimator == name), None)
    return "" if row is None else f"{1 / quality.gain(name):.2g}" + _mark(row)


def slope_table(qualities: Sequence[Quality]) -> list[str]:
    """SNR of the address against K, and the slope in logarithms."""
    lines = []
    for (program, stage), group in _by_program(qualities).items():
        budgets = [quality.evaluations for quality in group]
        rows = [
            [name, *(f"{value:.3g}" for value in values), slope_of(budgets, values)]
            for name, values in snr_of(group).items()
        ]
        shown = table(["estimator", *(f"{b} runs" for b in budgets), "slope"], rows)
        lines += [f"SNR of the address, {program} {stage}:", "", shown, ""]
    return lines


def snr_of(qualities: Sequence[Quality]) -> dict[str, list[float]]:
    """Signal-to-noise ratio of the address by estimator, in the order of the tables."""
    names = dict.fromkeys(row.estimator for quality in qualities for row in _rows(quality))
    return {name: [quality.table.of(name, ADDRESS).snr for quality in qualities] for name in names}


def slope_of(particles: Sequence[int], snr: Sequence[float]) -> str:
    """The fitted slope, or why there is none."""
    usable = [(k, value) for k, value in zip(particles, snr, strict=True) if 0 < value < math.inf]
    if len(usable) < 2:
        return "lost in noise"
    return f"{fit_slope([k for k, _ in usable], [value for _, value in usable]):+.2f}"


def _by_program(qualities: Sequence[Quality]) -> dict[tuple[str, str], list[Quality]]:
    groups: dict[tuple[str, str], list[Quality]] = {}
    for quality in qualities:
        groups.setdefault((quality.program, quality.stage), []).append(quality)
    return groups


def _rows(quality: Quality) -> list[Row]:
    """The address's rows with a finite figure."""
    return [r for r in quality.table.rows if r.group == ADDRESS and math.isfinite(r.variance_time)]


BOUND = "iwae"  # the K-sample bound, which VIMCO follows


def _named(row: Row) -> str:
    return row.estimator + _mark(row)


def _mark(row: Row) -> str:
    if not row.claims_unbiased:
        return " (biased)"
    return "" if row.objective == BOUND else f" ({row.objective})"


def _mean_of(runs: Sequence[Training]) -> float:
    return sum(_mean(run) for run in runs) / len(runs)


def _mean(run: Training) -> float:
    estimate: Estimate | None = run.test_nll
    return math.inf if estimate is None else estimate.mean
