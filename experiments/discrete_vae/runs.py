"""One run: an estimator trains a model, and leaves a small file with its curve and a checkpoint to go on from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import results
from discrete_vae.images import Batches, Images
from discrete_vae.programs import ARCHITECTURES, Programs, build
from discrete_vae.recorded import Recorded
from discrete_vae.scores import score
from vma_pyro._system import checkpoint
from vma_pyro._system.atomic import write_text
from vma_pyro.infer import make
from vma_pyro.infer.comparison.compare import evaluations_of

LEARNED_RATE = 1e-3  # of what an estimator learns itself, with Adam
COLUMNS = ("update", "bound", "train_elbo", "train_bound", "validation_elbo", "validation_bound", "seconds")


@dataclass(frozen=True)
class Job:
    """What a run is; all of it decides every figure.

    Attributes:
        data, model, estimator: by name.
        num_particles: K.
        seed: of the initial weights, the order of images, and the noise.
        temperature: of a relaxation; None: the estimator's own.
    """

    data: str
    model: str
    estimator: str
    num_particles: int
    seed: int
    temperature: float | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        values = (getattr(self, field.name) for field in fields(self))
        return "-".join(str(value) for value in values if value is not None)


@dataclass(frozen=True)
class Schedule:
    """How long, and what is measured on the way.

    Attributes:
        updates: in all.
        evaluate_every: updates between rows of the curve.
        elbo_images: images of the training and of the validation set whose ELBO a row has, one sample each.
        bound_images: of each whose bound it has.
        score_images: of each, and of the test set, for the scores at the end.
        samples: of the bound.
        checkpoint_seconds: between checkpoints.
    """

    updates: int
    evaluate_every: int
    elbo_images: int
    bound_images: int
    score_images: int
    samples: int
    checkpoint_seconds: float


class Training:
    """The state of a run: all of it is in the checkpoint."""

    def __init__(self, job: Job, images: Images, *, note: Callable[[str], object] = print) -> None:
        architecture = ARCHITECTURES[job.model]
        torch.manual_seed(job.seed)
        self.programs = build(architecture, images.mean)
        self.batches = Batches(images.train, architecture.batch, job.seed)
        torch.manual_seed(job.seed)  # an estimator may draw weights of its own
        self.elbo = make_elbo(job, self.programs)
        self.loss_fn: nn.Module = self.elbo(*self.programs[:2])
        self.recorded = Recorded(self.loss_fn, note=note)
        self.optimizers = make_optimizers(self.loss_fn, self.programs, job.model)
        self.update, self.seconds, self.bound_sum = 0, 0.0, torch.zeros((), dtype=torch.float64)
        self.curve: list[list[float]] = []

    def step(self) -> None:
        """Make one update."""
        self.bound_sum -= self.recorded.gradient(self.batches.next())
        for optimizer in self.optimizers:
            optimizer.step()
        self.update += 1

    def measure(self, images: Images, schedule: Schedule) -> None:
        """Add a row to the curve; the bound is the mean over all batches since the last one.

        Raises:
            FloatingPointError: it is not finite.
        """
        since = self.curve[-1][0] if self.curve else 0
        bound = float(self.bound_sum) / (self.update - since)
        if not math.isfinite(bound):
            raise FloatingPointError(f"training: expected a finite bound, got {bound} at update {self.update}")
        self.bound_sum.zero_()
        row = [bound]
        for part in (images.train, images.validation):
            row += [
                score(self.programs, part[: schedule.elbo_images], samples=1)["elbo"].mean,
                score(self.programs, part[: schedule.bound_images], samples=schedule.samples)["bound"].mean,
            ]
        self.curve.append([self.update, *(round(value, 3) for value in row), round(self.seconds, 2)])

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        content = {
            "loss_fn": self.loss_fn.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batches": self.batches.state_dict(),
            "noise": torch.get_rng_state(),
            "bound_sum": self.bound_sum,
            **{name: getattr(self, name) for name in ("update", "seconds", "curve")},
        }
        checkpoint.save(path, content)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        content = checkpoint.load(path)
        checkpoint.restore(self.loss_fn, content["loss_fn"], name="the run")
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.batches.load_state_dict(content["batches"])
        for name in ("update", "seconds", "curve", "bound_sum"):
            setattr(self, name, content[name])
        torch.set_rng_state(content["noise"])


def make_elbo(job: Job, programs: Programs) -> Any:
    """Make the estimator of a run.

    Raises:
        ValueError: no such estimator, or what it refuses; a temperature for one that has none.
    """
    elbo = make(job.estimator, job.num_particles, site=programs.sites)
    if job.temperature is not None:
        if not hasattr(elbo, "temperature"):
            raise ValueError(f"temperature: expected none for {job.estimator!r}, got {job.temperature}")
        elbo.temperature = job.temperature
    return elbo


def make_optimizers(loss_fn: nn.Module, programs: Programs, model: str) -> list[torch.optim.Optimizer]:
    """Adam or RAdam for the networks, plain gradient descent for the prior, Adam for what the estimator learns."""
    architecture = ARCHITECTURES[model]
    weights = {id(p): p for program in programs[:2] for p in program.parameters()}
    prior = getattr(programs.model, "prior", None)
    learned = [p for p in loss_fn.parameters() if id(p) not in weights]
    networks = [p for p in weights.values() if p is not prior]
    kind = getattr(torch.optim, architecture.optimizer)
    fused = {"fused": True} if kind is torch.optim.Adam else {}
    found = [kind(networks, architecture.rate, **fused)]
    if prior is not None and architecture.prior_rate:
        found.append(torch.optim.SGD([prior], architecture.prior_rate))
    if learned:
        found.append(torch.optim.Adam(learned, LEARNED_RATE, fused=True))
    return found


def train(
    job: Job,
    images: Images,
    schedule: Schedule,
    folder: Path,
    *,
    resume: bool = False,
    go_on: Callable[[], bool] = lambda: True,
) -> Training:
    """Train, or go on with it, until all updates are made or `go_on` says no.

    Leaves NAME.json, with every row of the curve so far and the scores at the end, and NAME.pt.

    Raises:
        ValueError: an earlier run, without `resume`; what the estimator refuses.
        FloatingPointError: a bound that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job.name}.pt"
    training = Training(job, images, note=lambda line: tqdm.write(f"{job.name}: {line}"))
    cost = evaluations_of(
        copy.deepcopy(training.elbo), *training.programs[:2], (training.batches.images[:4].float(),)
    )
    if path.exists():
        if not resume:
            raise ValueError(f"out: expected no run of {job.name} in it without resume, found {path.name}")
        training.load(path)
    saved = time.monotonic()
    for _ in _updates(training, schedule.updates, job.name):
        if not go_on():
            break
        before = time.perf_counter()
        training.step()
        training.seconds += time.perf_counter() - before
        if training.update % schedule.evaluate_every == 0 or training.update == schedule.updates:
            training.measure(images, schedule)
            _write(job, training, cost, folder)
            saved = -math.inf
        if time.monotonic() - saved > schedule.checkpoint_seconds:
            training.save(path)
            saved = time.monotonic()
    training.save(path)
    if training.update >= schedule.updates:
        _write(job, training, cost, folder, scores=final_scores(training.programs, images, schedule))
    return training


def _updates(training: Training, updates: int, label: str) -> Iterator[None]:
    with tqdm(total=updates, initial=training.update, desc=label, unit="update", mininterval=5) as bar:
        while training.update < updates:
            yield
            bar.update()


def final_scores(programs: Programs, images: Images, schedule: Schedule) -> dict[str, Any]:
    """Score the three sets: their ELBO and bound with standard errors over images."""
    found = {}
    for name, part in zip(Images._fields, images, strict=True):
        scores = score(programs, part[: schedule.score_images], samples=schedule.samples)
        found[name] = {what: mean._asdict() for what, mean in scores.items()}
    return found | {"samples": schedule.samples}


def _write(
    job: Job, training: Training, cost: float, folder: Path, *, scores: dict[str, Any] | None = None
) -> None:
    """Write what a run has come to."""
    elbo = training.elbo
    content = {
        **{field.name: getattr(job, field.name) for field in fields(job)},
        "objective": elbo.objective,
        "unbiased": elbo.unbiased,
        "evaluations": cost,
        "batch": training.batches.size,
        "updates": training.update,
        "replayed": training.recorded.possible,
        "versions": results.versions(torch.device("cpu")),
        "columns": COLUMNS,
        "curve": training.curve,
        "scores": scores,
    }
    write_text(folder / f"{job.name}.json", results.to_json(content))
