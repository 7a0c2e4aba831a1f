"""Which gradient estimator for a memory model: gradient quality, training curves, and a page that says which.

(a) Gradients on a small mixture whose discrete site can be summed, on procedural glyphs, and on the data, at the
start, in the middle and at the end of training, for several numbers of particles and memory sizes. (b) Every
estimator trains the same model from the same initial weights with the same number of decoder evaluations; then
VIMCO for longer, and the best of the others in half of its time. (c) The page `estimators.md`. Interrupted, it
goes on with --resume. Without options it takes minutes, on procedural glyphs.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyro
import torch

from common import plots
from common.kept import check_same
from laboratory import (
    Findings,
    LaboratoryConfig,
    Training,
    address_snr,
    measure_all,
    to_markdown,
    train_all,
    train_finalists,
)
from laboratory.pictures import save_curves, save_slopes
from vma_pyro import cli
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro._system.command import command
from vma_pyro.data import load_split
from vma_pyro.training import keep_freed_memory

MOST_CURVES = 6  # in a picture: more cannot be told apart


def main(config: LaboratoryConfig) -> None:
    """Train all candidates, measure their gradients, and write."""
    if config.redraw:
        found = Findings.of_plain(json.loads((config.out / "estimators.json").read_text()))
        write_page(config.out, found)
        return
    config = config.resolved()
    assert config.final_minutes is not None
    keep_freed_memory()
    lock.take(config.out, argument="out")
    if config.out.exists() and any(config.out.iterdir()) and not config.resume:
        raise ValueError(f"out: expected a new or empty folder, or --resume, got {config.out}")
    check_same(config)
    start = time.monotonic()
    data = load_split(config.data, config.data_dir)
    training = train_all(config, data)
    final = train_finalists(config, data, training)
    stages, particles, memories = measure_all(config, data, final[0].candidate)
    plan = config.plan()
    minutes = (time.monotonic() - start) / 60
    about = (
        f"Data: {config.data}; memories of {plan.classes} classes x {plan.shots} examples; networks of width",
        f"{config.width}; seed {config.seed}. Tables: {config.draws} gradients (toy: {2 * config.draws}) of",
        f"{config.images} held-out images each; the middle of training is VIMCO's model after {config.minutes:g}",
        f"minutes, the end after {config.final_minutes[-1]:g}. Test NLL, mean ± standard error: upper bound",
        f"from {config.test_samples} samples, {config.test_images} images, each with a memory of its own.",
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, pyro {pyro.__version__},",
        f"python {platform.python_version()}.",
    )
    found = Findings(
        command(), about, tuple(stages), tuple(particles), tuple(memories), tuple(training), tuple(final)
    )
    write(config, found)
    print(f"{minutes:.0f} minutes in this session")
    print((config.out / "estimators.md").read_text().split("## All figures")[0])


def write(config: LaboratoryConfig, found: Findings) -> None:
    """Write estimators.md, estimators.json and the pictures."""
    write_text(config.out / "estimators.json", json.dumps(found.plain(), indent=1) + "\n")
    write_page(config.out, found)


def write_page(folder: Path, found: Findings) -> None:
    """Write the page, and draw training curves, those of the final, and signal-to-noise ratios."""
    write_text(folder / "estimators.md", to_markdown(found))
    longest = max((run.final_minutes or 0.0 for run in found.final), default=0.0)
    final = [run for run in found.final if run.final_minutes == longest]
    chosen = telling([run for run in found.training if run.validation])
    for name, seen in (("training.png", chosen), ("final.png", [run for run in final if run.validation])):
        nll, kl = (
            {label_in_pictures(run): getattr(run, of) for run in seen} for of in ("validation", "kl_address")
        )
        plots.drawn(folder / name, partial(save_curves, nll=nll, kl_address=kl))
    end = [q for q in found.particles if q.program != "toy" and q.stage == "end"]
    runs_of_model = [q.evaluations for q in end]
    ratios = {name: values for name, values in address_snr(end).items() if any(value > 0 for value in values)}
    best = sorted(ratios, key=lambda name: -max(ratios[name]))
    shown = [name for name in ratios if name in ("vimco", *best[: MOST_CURVES - 1])]
    plots.drawn(
        folder / "slopes.png",
        lambda path: save_slopes(path, runs_of_model, {name: ratios[name] for name in shown}),
    )


def telling(runs: Sequence[Training]) -> list[Training]:
    """Choose what a picture can show: the first run; of the other estimators' best runs the best, middle, worst.

    All runs stand in the tables.
    """
    if len(runs) <= MOST_CURVES:
        return list(runs)
    first, *others = runs
    best: dict[str, Training] = {}
    for run in others:
        known = best.get(run.estimator)
        other = run.estimator != first.estimator and not run.stopped
        if other and (known is None or run.last_nll < known.last_nll):
            best[run.estimator] = run
    ranked = sorted(best.values(), key=lambda run: run.last_nll)
    if len(ranked) < MOST_CURVES:
        return [first, *ranked]
    return [first, *ranked[: MOST_CURVES - 3], ranked[len(ranked) // 2], ranked[-1]]


def label_in_pictures(run: Training) -> str:
    """Name a run in the pictures."""
    final = "" if run.final_minutes is None else f", final {run.final_minutes:g}, seed {run.seed}"
    return run.label + final


if __name__ == "__main__":
    cli.run(main, LaboratoryConfig, __doc__)
