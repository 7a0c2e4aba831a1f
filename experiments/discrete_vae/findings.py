"""The figures of all runs: read from their files, and compared at equal updates, seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from discrete_vae.runs import COLUMNS, Job
from vma_pyro.evaluation import Mean


class Run(NamedTuple):
    """One run, see `runs.Job`; `evaluations` are runs of the model per image and update.

    Attributes:
        curve: rows of `runs.COLUMNS`.
        scores: at the end; None while it is under way.
    """

    data: str
    model: str
    estimator: str
    num_particles: int
    seed: int
    temperature: float | None
    objective: str
    unbiased: bool
    evaluations: float
    updates: int
    curve: list[list[float]]
    scores: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run's file.

        Raises:
            ValueError: another kind of file.
        """
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or tuple(content.get("columns", ())) != COLUMNS:
            raise ValueError(f"folder: expected files of runs and variances, got {path.name}")
        return cls(*(content[name] for name in cls._fields))

    @property
    def name(self) -> str:
        """Name the run, as its file is."""
        job = Job(self.data, self.model, self.estimator, self.num_particles, self.seed, self.temperature)
        return job.name

    @property
    def label(self) -> str:
        """Name the estimator."""
        at = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.estimator}, K = {self.num_particles}{at}"

    def at(self, updates: int) -> dict[str, float] | None:
        """Find the row of the curve after so many updates."""
        rows = (dict(zip(COLUMNS, row, strict=True)) for row in self.curve)
        return next((row for row in rows if row["update"] == updates), None)

    @property
    def milliseconds(self) -> float:
        """Median time of an update over the rows of the curve; other work on the machine slows some of them."""
        rows = [[0.0] * len(COLUMNS), *self.curve]
        each = [(b[-1] - a[-1]) / (b[0] - a[0]) for a, b in pairwise(rows) if b[0] > a[0]]
        return 1e3 * statistics.median(each)


class Line(NamedTuple):
    """The runs of one estimator that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Any of them."""
        return self.runs[0]

    @property
    def entry(self) -> tuple[str, int]:
        """Estimator and K."""
        return self.first.estimator, self.first.num_particles

    def mean(self, column: str, updates: int) -> Mean:
        """Average a column over seeds."""
        return Mean.of(torch.tensor([value for _, value in sorted(self.by_seed(column, updates).items())]))

    def minus(self, other: Line, column: str, updates: int) -> Mean | None:
        """Average the difference to another's over the seeds that both have; None where there are none."""
        ours, theirs = self.by_seed(column, updates), other.by_seed(column, updates)
        both = sorted(ours.keys() & theirs.keys())
        return Mean.of(torch.tensor([ours[seed] - theirs[seed] for seed in both])) if both else None

    def by_seed(self, column: str, updates: int) -> dict[int, float]:
        """Read a column after so many updates."""
        rows = {run.seed: run.at(updates) for run in self.runs}
        return {seed: row[column] for seed, row in rows.items() if row is not None}

    def score(self, part: str, what: str) -> Mean | None:
        """Average a score at the end over the seeds that have one."""
        found = [run.scores[part][what]["mean"] for run in self.runs if run.scores]
        return Mean.of(torch.tensor(found)) if found else None


class Group(NamedTuple):
    """All lines of a data set and a model."""

    data: str
    model: str
    lines: tuple[Line, ...]

    def lengths(self) -> list[int]:
        """Numbers of updates after which lines are compared: where any two of them have ended.

        With one line alone its own end.
        """
        ends = sorted({run.updates for line in self.lines for run in line.runs if run.scores})
        several = [end for end in ends if len(self.after(end)) > 1]
        return several or ends[-1:]

    def after(self, updates: int) -> list[Line]:
        """The lines with a row after so many updates, best training ELBO first."""
        found = [line for line in self.lines if line.by_seed("train_elbo", updates)]
        return sorted(found, key=lambda line: -line.mean("train_elbo", updates).mean)

    def find(self, entry: tuple[str, int], updates: int) -> Line | None:
        """Find an estimator and K among them."""
        return next((line for line in self.after(updates) if line.entry == entry), None)


def read_runs(folder: Path) -> list[Run]:
    """Read all runs of a folder.

    Raises:
        ValueError: there is none.
    """
    runs = [Run.read(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith("variance-")]
    if not runs:
        raise ValueError(f"folder: expected files of runs, found none in {folder.name}")
    return runs


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Put the runs of one data set and model together, and those that differ in their seed alone."""
    lines: dict[Any, list[Run]] = {}
    for run in runs:
        lines.setdefault((run.data, run.model, run.estimator, run.num_particles, run.temperature), []).append(run)
    groups: dict[tuple[str, str], list[Line]] = {}
    for key, found in lines.items():
        groups.setdefault(key[:2], []).append(Line(tuple(found)))
    return [Group(data, model, tuple(found)) for (data, model), found in groups.items()]


def verdict(difference: Mean | None) -> str:
    """Say whether a difference that others found above zero is so here, beyond two standard errors."""
    if difference is None:
        return "not run"
    if math.isnan(difference.se):
        return "agreed, one seed" if difference.mean > 0 else "not agreed, one seed"
    if abs(difference.mean) <= 2 * difference.se:
        return "undecided"
    return "agreed" if difference.mean > 0 else "not agreed"


def shown(value: Mean | None) -> str:
    """Write a mean with its standard error, where there is one."""
    if value is None:
        return ""
    return f"{value.mean:.2f}" if math.isnan(value.se) else f"{value.mean:.2f} ± {value.se:.2f}"


def ranks(values: Sequence[float]) -> list[int]:
    """Rank values, the largest first."""
    return [1 + sum(other > value for other in values) for value in values]
