"""The training loop, on Lightning Fabric.

A run is a function of its configuration: stopped at any moment and resumed, it gives the figures of an
uninterrupted one, bit for bit on a CPU (with a budget in updates; one in minutes depends on the clock).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vma_pyro import checkpoint
from vma_pyro.data import Episode, EpisodeSampler
from vma_pyro.evaluation import log_likelihood, split_bound, undisturbed
from vma_pyro.record import Recorder


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The run ends at the first of `updates` and `minutes`; the learning rate follows the nearer one.
    """

    updates: int | None = None
    """Budget in parameter updates."""
    minutes: float | None = None
    """Budget in minutes of training, over all sessions of the run."""
    session_minutes: float | None = None
    """Leave with a checkpoint after so many minutes in this process; go on with resume."""
    learning_rate: float = 1e-3
    """Of Adam, after a linear warm-up; falls along a half cosine to `final_rate` of it."""
    final_rate: float = 0.02
    """Share of the learning rate that is left at the end."""
    warmup_updates: int = 200
    """Updates of linear warm-up."""
    clip_norm: float = 100.0
    """Largest norm of the gradient of the mean bound per image; the start of training needs it."""
    ema_decay: float = 0.998
    """Of the exponential moving average of the weights, which is what validation and evaluation see."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    validate_every: int = 500
    """Updates between validations on held-out classes."""
    validation_samples: int = 8
    """Importance samples per validation image."""
    patience: int = 20
    """Validations without improvement before stopping early."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    accelerator: str = "auto"
    """cpu, cuda, or auto: one GPU if there is one."""
    precision: str = "32-true"
    """Fabric's name of the arithmetic: 32-true, or bf16-mixed."""
    seed: int = 0
    """Of the noise in training."""

    def __post_init__(self) -> None:
        """Refuse nonsensical steps."""
        for name in ("updates", "minutes", "session_minutes", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        for name in ("log_every", "validate_every", "validation_samples", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")


# What may differ between the sessions of one run, because it does not change its figures.
_FREE_ON_RESUME = ("session_minutes", "checkpoint_seconds", "accelerator")


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
        updates: made in all sessions.
        seconds: of training in all sessions.
        validation_nll: of the weights that were kept, in nats per image; NaN without validation.
        interrupted: the signal that stopped it, or 0; a run out of `session_minutes` counts as SIGTERM.
    """

    updates: int
    seconds: float
    validation_nll: float
    interrupted: int


def fit(
    model: nn.Module,
    guide: nn.Module,
    elbo: ELBO,
    episodes: EpisodeSampler,
    *,
    config: TrainConfig,
    folder: Path,
    validation: Sequence[Episode] = (),
    architecture: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    label: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train model and guide; on return they hold the averaged weights of the best validation.

    Writes `metrics.jsonl` and `checkpoint.pt` to the folder. Ctrl-C and SIGTERM end the run after the update
    under way, with a checkpoint.

    Args:
        model, guide: modules of (memory, x) that may share parameters.
        elbo: any ELBO with a `differentiable_loss`.
        episodes: where training data comes from.
        config: how to train.
        folder: of the run; is made.
        validation: episodes of held-out classes for early stopping; none: the last weights are kept.
        architecture: plain values from which the networks can be rebuilt; kept in the checkpoint.
        identity: further plain values that a resumed run must share (data, objective, ...).
        resume: go on from the folder's checkpoint if there is one.
        tensorboard: also write TensorBoard events.
        label: in front of the progress line.
        show_progress: whether to draw the progress line.

    Raises:
        ValueError: no budget, resumed with another configuration or architecture, or a damaged checkpoint.
        OSError: the folder cannot be written; the final checkpoint cannot.
        FloatingPointError: the bound or a parameter is no longer a finite number.
    """
    if config.updates is None and config.minutes is None:
        raise ValueError("updates: expected a budget in updates or minutes, got neither")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, guide, elbo, episodes, config, folder / "checkpoint.pt")
    run.identity = {
        **{k: v for k, v in asdict(config).items() if k not in _FREE_ON_RESUME},
        **(identity or {}),
    }
    run.architecture = architecture or {}
    if resume and run.path.exists():
        run.restore()
    recorder = Recorder(
        folder,
        resume_at=run.update,
        tensorboard=tensorboard,
        total=config.updates,
        label=label,
        show=show_progress,
    )
    try:
        with _stop_signals() as stop:
            try:
                _train(run, validation, recorder, stop)
            except (RuntimeError, ValueError) as error:
                # Sampling from NaN fails in many ways, none of which says what went wrong.
                if "nan" not in str(error).lower():
                    raise
                raise run.diverged("parameters", "NaN") from error
        run.finished = not stop.signal
        if run.finished and run.best is None:
            run.keep()
        run.save()
    finally:
        recorder.close()
    run.load_best()
    return FitResult(run.update, run.seconds, run.best_nll, stop.signal)


def _train(run: _Run, validation: Sequence[Episode], recorder: Recorder, stop: _Stop) -> None:
    """The loop itself."""
    config, fabric = run.config, run.fabric
    session_start = last_save = tick = time.monotonic()
    while not (run.finished or stop.signal or run.progress() >= 1 or run.stale >= config.patience):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(config, run.update, run.progress())
        episode = run.episodes.sample().to(fabric.device)
        loss = run.loss_fn(episode.memory, episode.x) / len(episode.x)
        run.optimizer.zero_grad()
        fabric.backward(loss)
        norm = nn.utils.clip_grad_norm_(run.loss_fn.parameters(), config.clip_norm)
        run.optimizer.step()
        run.average.update_parameters(run.bare)
        run.update += 1
        run.bound_sum -= loss.detach().double()
        run.bound_count += 1
        recorder.advance()
        if run.update % config.log_every == 0:
            now = time.monotonic()
            speed = config.log_every / max(now - tick, 1e-9)
            recorder.write(run.update, **run.figures(episode, norm), seconds=run.seconds, updates_per_second=speed)
            tick = now
        if validation and run.update % config.validate_every == 0:
            nll = run.validate(validation)
            recorder.write(run.update, validation_nll=nll, best_validation_nll=run.best_nll)
        now = time.monotonic()
        run.seconds = run.seconds_before + now - session_start
        if now - last_save > config.checkpoint_seconds:
            run.try_to_save(recorder)
            last_save = time.monotonic()
        if config.session_minutes is not None and now - session_start > 60 * config.session_minutes:
            stop.signal = stop.signal or signal.SIGTERM


class _Run:
    """The state of a run: all of it goes into the checkpoint, and nothing else decides how it goes on."""

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        elbo: ELBO,
        episodes: EpisodeSampler,
        config: TrainConfig,
        path: Path,
    ) -> None:
        from lightning_fabric import Fabric  # seconds to import

        self.config, self.episodes, self.path = config, episodes, path
        accelerator = config.accelerator
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=config.precision)  # type: ignore[arg-type]
        torch.manual_seed(config.seed)
        self.bare = elbo(model, guide).to(self.fabric.device)
        optimizer = torch.optim.Adam(self.bare.parameters(), config.learning_rate, fused=True)
        self.average = AveragedModel(self.bare, multi_avg_fn=_average(config.ema_decay))
        self.loss_fn, self.optimizer = self.fabric.setup(self.bare, optimizer)
        self.identity: dict[str, Any] = {}
        self.architecture: dict[str, Any] = {}
        self.update = self.stale = self.bound_count = 0
        self.seconds = self.seconds_before = 0.0
        self.best: dict[str, Tensor] | None = None
        self.best_nll = math.nan
        self.finished = False
        self.bound_sum = torch.zeros((), dtype=torch.float64, device=self.fabric.device)

    def diverged(self, what: str, got: object) -> FloatingPointError:
        """The error of a run that cannot go on."""
        return FloatingPointError(
            f"training: expected finite {what}, got {got} at update {self.update}; "
            f"lower the learning rate (now {self.config.learning_rate})"
        )

    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        by_updates = self.update / self.config.updates if self.config.updates else 0.0
        by_time = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_updates, by_time))

    def figures(self, episode: Episode, norm: Tensor) -> dict[str, float]:
        """The bound since the last line, and the KL split of the last episode."""
        bound = self.bound_sum.item() / self.bound_count
        if not math.isfinite(bound):
            raise self.diverged("bounds", bound)
        self.bound_sum.zero_()
        self.bound_count = 0
        model, guide = self.bare.model, self.bare.guide
        with undisturbed(model, guide, seed=self.update, device=self.fabric.device):
            split = split_bound(model, guide, episode.memory, episode.x)
        return {
            "bound": bound,
            "kl_address": split.kl_address.mean().item(),
            "kl_z": split.kl_z.mean().item(),
            "gradient_norm": norm.item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def validate(self, validation: Sequence[Episode]) -> float:
        """NLL of held-out classes under the averaged weights; keeps these if it is the best so far."""
        average: Any = self.average.module
        nll = [
            -log_likelihood(
                average.model, average.guide, e.memory, e.x, num_samples=self.config.validation_samples
            )
            for e in (episode.to(self.fabric.device) for episode in validation)
        ]
        mean = torch.cat(nll).mean().item()
        if self.best is None or mean < self.best_nll:
            self.keep()
            self.best_nll, self.stale = mean, 0
        else:
            self.stale += 1
        return mean

    def keep(self) -> None:
        """Remember the averaged weights."""
        self.best = {name: value.detach().clone() for name, value in self.average.module.state_dict().items()}

    def load_best(self) -> None:
        """Put the remembered weights into model and guide, on the CPU or wherever they are."""
        self.bare.load_state_dict(self.best if self.best is not None else self.average.module.state_dict())

    def save(self) -> None:
        """Write the checkpoint."""
        cuda = torch.cuda.get_rng_state(self.fabric.device) if self.fabric.device.type == "cuda" else None
        content = {
            "architecture": self.architecture,
            "weights": self.best if self.best is not None else self.average.module.state_dict(),
            "identity": self.identity,
            "module": self.bare.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "episodes": self.episodes.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "progress": {
                "update": self.update,
                "seconds": self.seconds,
                "finished": self.finished,
                "has_best": self.best is not None,
                "best_nll": self.best_nll,
                "stale": self.stale,
                "bound_sum": self.bound_sum.item(),
                "bound_count": self.bound_count,
            },
        }
        checkpoint.save(self.path, content)

    def try_to_save(self, recorder: Recorder) -> None:
        """Write the checkpoint, but let a full disk end neither the run nor the previous checkpoint."""
        try:
            self.save()
        except OSError as error:
            recorder.note(f"warning: checkpoint not written ({error}); the previous one is kept")

    def restore(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: written under another configuration, or damaged.
        """
        content = checkpoint.load(self.path)
        if "progress" not in content:
            raise ValueError(f"checkpoint {self.path}: expected one of a training run, got weights only")
        check_identity(content["identity"], self.identity)
        checkpoint.restore(self.bare, content["module"], name="this run")
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.episodes.load_state_dict(content["episodes"])
        torch.set_rng_state(content["rng"]["cpu"])
        if content["rng"]["cuda"] is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(content["rng"]["cuda"], self.fabric.device)
        progress = content["progress"]
        self.update, self.stale = progress["update"], progress["stale"]
        self.seconds = self.seconds_before = progress["seconds"]
        self.best = content["weights"] if progress["has_best"] else None
        self.best_nll, self.finished = progress["best_nll"], progress["finished"]
        self.bound_sum.fill_(progress["bound_sum"])
        self.bound_count = progress["bound_count"]


def learning_rate(config: TrainConfig, update: int, progress: float) -> float:
    """Linear warm-up, then a half cosine from the full rate to `final_rate` of it."""
    warm = min(1.0, (update + 1) / max(1, config.warmup_updates))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warm * (config.final_rate + (1 - config.final_rate) * cosine)


def check_identity(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse to resume a run under another configuration, naming the first value that differs."""
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"resume: expected {name} = {saved.get(name)!r} as in the checkpoint, got {present.get(name)!r}"
            )


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average with a warm-up: early on it forgets the initial weights faster."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


class _Stop:
    """Set by a signal, read by the loop."""

    signal: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn Ctrl-C and SIGTERM into a request to stop; a second one acts as usual."""
    stop = _Stop()
    previous: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(number, previous[number])

    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
