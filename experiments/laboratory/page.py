"""The laboratory's page: what its figures say in short, and all of them in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from laboratory.answers import address_answers, memory_answers, particle_answers, title, training_answers
from laboratory.findings import (
    Findings,
    Quality,
    Training,
    address_snr,
    by_length,
    by_program,
    objective_mark,
)
from vma_pyro._system.markdown import table
from vma_pyro.infer import fit_slope


def to_markdown(found: Findings) -> str:
    """Write the whole page."""
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
        "Of VIMCO and of the best, middle and worst of the others' best runs:",
        "",
        "![Validation NLL and KL(a) against updates and seconds](training.png)",
        "",
        "## The final: VIMCO, and the best of the others in half of its time",
        "",
        "Half of the time is a number of updates, from updates of both timed in turns; the seconds are by the",
        "clock, with whatever else the machine was doing.",
        "",
        *(line for final in by_length(found.final) for line in final_table(final)),
        "The longest final:",
        "",
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


def final_table(final: Sequence[Training]) -> list[str]:
    """Write the table of each seed under a heading."""
    lines = []
    for seed in dict.fromkeys(run.seed for run in final):
        runs = [run for run in final if run.seed == seed]
        lines += [f"### {runs[0].final_minutes:g} minutes, seed {seed}", "", training_table(runs), ""]
    return lines


def training_table(runs: Sequence[Training]) -> str:
    """Write one line per run, the best test NLL first; the first run is VIMCO's."""
    judge = runs[0]
    target = judge.validation[-1][2] if judge.validation else math.nan
    head = ["estimator", "updates", "runs of the model per image", "seconds", "test NLL, nats"]
    head += ["less VIMCO's, paired", "test KL(a), nats", "seconds to VIMCO's last validation NLL"]
    lines = []
    for run in sorted(runs, key=lambda run: run.mean_nll):
        reached = run.seconds_to(target)
        lines.append(
            [run.label, run.updates, f"{run.evaluations:.3g}", f"{run.seconds:.0f}", run.test_nll or "diverged"]
            + [run.test_minus_vimco or "", run.test_kl_address or ""]
            + [f"{reached:.0f}" if reached < math.inf else "never"]
        )
    return table(head, lines)


def gain_table(qualities: Sequence[Quality]) -> str:
    """Tabulate variance x time on the address relative to VIMCO: tables down, estimators across, or swapped."""
    names = list(dict.fromkeys(row.estimator for quality in qualities for row in quality.address_rows()))
    heads = [f"{q.program} {q.stage}".strip() + f", M = {q.memory}" for q in qualities]
    cells = [[_gain(quality, name) for quality in qualities] for name in names]
    if len(names) < len(heads):
        names, heads, cells = heads, names, [list(column) for column in zip(*cells, strict=True)]
    return table(["", *heads], [[name, *row] for name, row in zip(names, cells, strict=True)])


def _gain(quality: Quality, name: str) -> str:
    row = next((r for r in quality.address_rows() if r.estimator == name), None)
    return "" if row is None else f"{1 / quality.gain(name):.2g}" + objective_mark(row)


def slope_table(qualities: Sequence[Quality]) -> list[str]:
    """Tabulate the SNR of the address against K, and the slope in logarithms."""
    lines = []
    for (program, stage), group in by_program(qualities).items():
        budgets = [quality.evaluations for quality in group]
        rows = [
            [name, *(f"{value:.3g}" for value in values), format_slope(budgets, values)]
            for name, values in address_snr(group).items()
        ]
        shown = table(["estimator", *(f"{b} runs" for b in budgets), "slope"], rows)
        lines += [f"SNR of the address, {program} {stage}:", "", shown, ""]
    return lines


def format_slope(particles: Sequence[int], snr: Sequence[float]) -> str:
    """Write the fitted slope, or why there is none."""
    usable = [(k, value) for k, value in zip(particles, snr, strict=True) if 0 < value < math.inf]
    if len(usable) < 2:
        return "lost in noise"
    return f"{fit_slope([k for k, _ in usable], [value for _, value in usable]):+.2f}"
