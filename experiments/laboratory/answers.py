"""What the laboratory's figures say in short: which estimator to choose when."""

from __future__ import annotations

import math
from collections.abc import Sequence

from laboratory.findings import (
    BOUND,
    JUDGE,
    Findings,
    Quality,
    Training,
    address_snr,
    by_length,
    by_program,
    objective_mark,
)
from vma_pyro.infer import Row


def title(quality: Quality) -> str:
    """Name program, stage, |M| and budget."""
    stage = f", {quality.stage} of training" if quality.stage else ""
    return f"{quality.program}{stage}, |M| = {quality.memory}, {quality.evaluations} runs of the model"


def address_answers(found: Findings) -> list[str]:
    """Name the lowest variance x time on the address at each stage: of the unbiased, of VIMCO's bound, of all."""
    lines = []
    for quality in found.stages:
        rows = quality.address_rows()
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
    """Name the lowest variance x time on the address for each |M|, at the last stage that was measured."""
    lines = []
    for quality in _last_stage(memories):
        rows = [row for row in quality.address_rows() if row.claims_unbiased]
        if rows:
            best = min(rows, key=lambda row: row.variance_time)
            gain = quality.gain(best.estimator)
            lines.append(f"|M| = {quality.memory}: {_named(best)}, {gain:.2f} times less than VIMCO's")
    if not lines:
        return []
    names = ", ".join(dict.fromkeys(row.estimator for quality in memories for row in quality.address_rows()))
    return [
        f"- Memories of other sizes, {memories[-1].program} {memories[-1].stage}, of {names}: {'; '.join(lines)}."
    ]


def particle_answers(particles: Sequence[Quality]) -> list[str]:
    """Name the highest signal-to-noise ratio with most runs of the model, at the last stage that was measured."""
    last = _last_stage(particles)
    snr = {name: values[-1] for name, values in address_snr(last).items() if values[-1] > 0} if last else {}
    if not snr:
        return []
    best = max(snr, key=lambda name: snr[name])
    most = max(quality.evaluations for quality in last)
    return [
        f"- Many particles, {last[0].program} {last[0].stage}: with {most} runs of the model the address has the "
        f"highest SNR under {best}: {snr[best]:.3g} (VIMCO: {snr.get(JUDGE, math.nan):.3g})."
    ]


def _last_stage(qualities: Sequence[Quality]) -> list[Quality]:
    groups = list(by_program(qualities).values())
    return groups[-1] if groups else []


def training_answers(found: Findings) -> list[str]:
    """Say which trains fastest, and whether any reaches VIMCO's result in half of its time."""
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


def final_answer(final: Sequence[Training]) -> list[str]:
    """Say whether any of the others reaches VIMCO's test NLL in half of its time, over all seeds."""
    runs: dict[str, list[Training]] = {}
    for run in final:
        runs.setdefault(run.label, []).append(run)
    (label, judge), *others = runs.items()
    complete = [(name, rival) for name, rival in others if all(run.test_nll for run in rival)]
    if not complete or not all(run.test_nll for run in judge):
        return []
    name, best = min(complete, key=lambda item: _mean_nll(item[1]))
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
        f"- The final, {judge[0].final_minutes:g} minutes: {label} has a test NLL of {_mean_nll(judge):.2f} nats "
        f"per image after {updates:.0f} updates, {seconds:.0f} s. In half of its time, {half:.0f} updates "
        f"that each take {best[0].update_cost:.2f} times as long (timed in turns), **{name}** has "
        f"{_mean_nll(best):.2f}: **{verdict}**. Differences, paired by image: {each}."
    ]


def _named(row: Row) -> str:
    return row.estimator + objective_mark(row)


def _mean_nll(runs: Sequence[Training]) -> float:
    return sum(run.mean_nll for run in runs) / len(runs)
