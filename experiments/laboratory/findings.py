"""What the laboratory finds: the quality of gradients, and training runs.

A run of the model is the unit of cost: one decoder evaluation for one image, forward and backward; forward alone
is a third. The address is the group "discrete guide": the parameters in log q(a | x, M) and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from laboratory.options import Candidate
from vma_pyro.evaluation import Mean
from vma_pyro.infer import Comparison, Row

ADDRESS = "discrete guide"
JUDGE = "vimco"
BOUND = "iwae"  # the K-sample bound, which VIMCO follows


class Quality(NamedTuple):
    """Holds one table of gradients.

    Attributes:
        program: what was measured.
        stage: of training: "start", "middle", "end", or "" where nothing is trained.
        memory: |M|.
        evaluations: budget in runs of the model per image and gradient.
        table: of estimators by groups of parameters.
    """

    program: str
    stage: str
    memory: int
    evaluations: int
    table: Comparison

    def gain(self, estimator: str, group: str = ADDRESS) -> float:
        """Say how many times less variance x time it has than VIMCO."""
        return self.table.of(JUDGE, group).variance_time / self.table.of(estimator, group).variance_time

    def address_rows(self) -> list[Row]:
        """List the rows of the address that have a finite figure."""
        return [row for row in self.table.rows if row.group == ADDRESS and math.isfinite(row.variance_time)]

    def plain(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return self._asdict() | {"table": self.table.plain()}

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Quality:
        """Read what `plain` gave."""
        return cls(**{**content, "table": Comparison.of_plain(content["table"])})


class Training(NamedTuple):
    """Holds one training run; NLL and KL(a) in nats per image, with standard errors where of test classes.

    Attributes:
        estimator: its name.
        num_particles: K.
        queries: images per update.
        learning_rate: of Adam, at its highest.
        evaluations: runs of the model per image and update.
        seed: of weights, episodes and draws.
        updates: made.
        seconds: of training, validation included.
        validation: of held-out classes: [update, seconds, NLL].
        kl_address: of training episodes: [update, seconds, KL(a)].
        test_nll, test_kl_address: at the end; None if it did not get there.
        test_minus_vimco: test NLL less that of VIMCO's run, paired by image.
        update_cost: time of one update over that of VIMCO's, both timed in turns, if it was.
        final_minutes: in the final, the time of the VIMCO run that it is or is held to.
        stopped: why it did not get to the end, or "".
    """

    estimator: str
    num_particles: int
    queries: int
    learning_rate: float
    evaluations: float
    seed: int
    updates: int
    seconds: float
    validation: list[list[float]]
    kl_address: list[list[float]]
    test_nll: Mean | None = None
    test_kl_address: Mean | None = None
    test_minus_vimco: Mean | None = None
    update_cost: float | None = None
    final_minutes: float | None = None
    stopped: str = ""

    @property
    def candidate(self) -> Candidate:
        """Name the candidate that this run trained."""
        return Candidate(self.estimator, self.num_particles, self.queries, self.learning_rate)

    @property
    def label(self) -> str:
        """Show name, K, images per update and learning rate."""
        return f"{self.estimator} (K = {self.num_particles}, {self.queries} images, {self.learning_rate:g})"

    @property
    def last_nll(self) -> float:
        """The last validation NLL; infinite for a run without any."""
        return self.validation[-1][2] if self.validation else math.inf

    @property
    def mean_nll(self) -> float:
        """Average the test NLL; infinite for a run that did not get to the end."""
        return math.inf if self.test_nll is None else self.test_nll.mean

    def seconds_to(self, nll: float) -> float:
        """Count the seconds until the validation NLL first was as low; infinity if it never was."""
        return next((seconds for _, seconds, value in self.validation if value <= nll), math.inf)

    def plain(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {k: v._asdict() if isinstance(v, Mean) else v for k, v in self._asdict().items()}

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Training:
        """Read what `plain` gave."""
        estimates = {k: Mean.read(v) for k, v in content.items() if k.startswith("test_") and v is not None}
        return cls(**{**content, **estimates})

    @classmethod
    def of_metrics(cls, lines: Sequence[Mapping[str, float]], **facts: Any) -> Training:
        """Make the record of a run from the lines of its metrics.jsonl."""
        seconds = {int(line["update"]): line["seconds"] for line in lines if "seconds" in line}
        validation = [
            [line["update"], line["seconds"], line["validation_nll"]] for line in lines if "validation_nll" in line
        ]
        kl_address = [
            [line["update"], line["seconds"], line["kl_address"]] for line in lines if "kl_address" in line
        ]
        last = max(seconds, default=0)
        return cls(
            updates=last, seconds=seconds.get(last, 0.0), validation=validation, kl_address=kl_address, **facts
        )


class Findings(NamedTuple):
    """Holds all that was measured.

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

    def plain(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        found = ("stages", "particles", "memories", "training", "final")
        plain = {name: [each.plain() for each in getattr(self, name)] for name in found}
        return {"command": self.command, "about": self.about, **plain}

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Findings:
        """Read what `plain` gave."""
        tables = ([Quality.of_plain(q) for q in content[name]] for name in ("stages", "particles", "memories"))
        runs = ([Training.of_plain(run) for run in content[name]] for name in ("training", "final"))
        return cls(content["command"], tuple(content["about"]), *map(tuple, tables), *map(tuple, runs))  # type: ignore[arg-type]  # two and three


def address_snr(qualities: Sequence[Quality]) -> dict[str, list[float]]:
    """List the signal-to-noise ratio of the address by estimator, in the order of the tables."""
    names = dict.fromkeys(row.estimator for quality in qualities for row in quality.address_rows())
    return {name: [quality.table.of(name, ADDRESS).snr for quality in qualities] for name in names}


def by_program(qualities: Sequence[Quality]) -> dict[tuple[str, str], list[Quality]]:
    """Group the tables by program and stage."""
    groups: dict[tuple[str, str], list[Quality]] = {}
    for quality in qualities:
        groups.setdefault((quality.program, quality.stage), []).append(quality)
    return groups


def by_length(final: Sequence[Training]) -> list[list[Training]]:
    """Group the final's runs by the length of VIMCO's."""
    lengths = dict.fromkeys(run.final_minutes for run in final)
    return [[run for run in final if run.final_minutes == length] for length in lengths]


def objective_mark(row: Row) -> str:
    """Mark an estimator that does not follow VIMCO's bound without bias: " (biased)", " (elbo)"."""
    if not row.claims_unbiased:
        return " (biased)"
    return "" if row.objective == BOUND else f" ({row.objective})"
