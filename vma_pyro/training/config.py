"""How to train: budget, steps, validation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vma_pyro._system.processor import is_faster_in_bf16
from vma_pyro.training.optimizers import RATES, check_optimizer

ACCELERATORS = ("auto", "cpu", "cuda", "mps")
COMPILE = ("auto", "on", "off")
KEPT = ("best", "last")
PRECISIONS = ("auto", "32-true", "bf16-mixed")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The run ends at the first of `updates` and `minutes`; the learning rate follows the nearer one.
    """

    updates: int | None = None
    """Budget in parameter updates."""
    minutes: float | None = None
    """Budget in minutes of training, over all sessions of the run."""
    new_budget: bool = False
    """On resume, take `updates` and `minutes` from here, not from the checkpoint: the learning rate follows them
    from now on, and a finished run goes on. To end a run early with small steps, or to train on."""
    session_minutes: float | None = None
    """Leave with a checkpoint after so many minutes in this process; go on with resume."""
    optimizer: str = "muon"
    """Muon (orthogonalised steps for the weights of layers, Adam for all other parameters and for the first
    quarter of the budget), adam alone, or soap, of the package pytorch-optimizer. # Departs from the paper, which
    has Adam: it takes twice as many updates to the same bound."""
    learning_rate: float | None = None
    """After a linear warm-up; it falls along a half cosine to `final_rate` of it. Default: 4e-3 for muon, 1.5e-3
    for adam and soap."""
    final_rate: float = 0.02
    """Share of the learning rate that is left at the end."""
    warmup_updates: int = 200
    """Updates of linear warm-up."""
    clip_norm: float = 100.0
    """Largest norm of the gradient of the mean bound per image; the start of training needs it."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights, which is what validation and evaluation see."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    validate_every: int = 500
    """Updates between validations on held-out classes."""
    validation_samples: int = 8
    """Importance samples per validation image."""
    patience: int = 20
    """Validations without improvement before stopping early."""
    keep: str = "best"
    """Which weights are kept: those of the best validation, or the last, without early stopping. The last, where
    the aim is not the NLL alone: with a likelihood of which a share is trained alone."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    accelerator: str = "auto"
    """Where to train: cpu, cuda (an NVIDIA GPU), mps (an Apple GPU), or auto, the first of cuda, mps and cpu there
    is."""
    precision: str = "auto"
    """Arithmetic: 32-true; bf16-mixed, where layers multiply in bfloat16 (weights, keys and probabilities stay in
    32 bits); or auto, bf16-mixed where the processor is faster in it. Evaluations are in 32 bits."""
    capture: bool = True
    """Record an update once and replay it without Python, bit for bit the same, where that is possible: on a CPU,
    in one process, with one memory for all images."""
    compile: str = "auto"
    """Translate the functions of the networks by `torch.compile`: on, off, or auto, where the budget is 20 minutes
    or more and updates are found to be faster by it. One line says which, and why."""
    seed: int = 0
    """Seed of the noise in training."""

    @property
    def rate(self) -> float:
        """The learning rate, or the optimizer's default."""
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    def __post_init__(self) -> None:
        """Refuse nonsensical steps."""
        for name in ("updates", "minutes", "session_minutes", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # NaN is refused as well
                raise ValueError(f"{name}: expected more than 0, got {value}")
            if value == math.inf and name != "clip_norm":
                raise ValueError(f"{name}: expected a finite number, got {value}")
        for name in ("log_every", "validate_every", "validation_samples", "patience"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("updates", "warmup_updates", "log_every", "validate_every", "validation_samples", "patience"):
            value = getattr(self, name)
            if value is not None and not float(value).is_integer():
                raise ValueError(f"{name}: expected a whole number, got {value}")
        if not self.warmup_updates >= 0:
            raise ValueError(f"warmup_updates: expected at least 0, got {self.warmup_updates}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate: expected a share from 0 to 1, got {self.final_rate}")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"checkpoint_seconds: expected at least 0, got {self.checkpoint_seconds}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}")
        if self.accelerator not in ACCELERATORS:
            raise ValueError(f"accelerator: expected one of {', '.join(ACCELERATORS)}, got {self.accelerator!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.compile not in COMPILE:
            raise ValueError(f"compile: expected one of {', '.join(COMPILE)}, got {self.compile!r}")
        if self.keep not in KEPT:
            raise ValueError(f"keep: expected one of {', '.join(KEPT)}, got {self.keep!r}")
        check_optimizer(self.optimizer)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")


# What may differ between the sessions of one run. Another accelerator rounds otherwise, but a run that began on a
# GPU may have to end on a CPU.
FREE_ON_RESUME = ("new_budget", "session_minutes", "checkpoint_seconds", "accelerator", "capture", "keep")
BUDGET = ("updates", "minutes")


def device_of(config: TrainConfig) -> torch.device:
    """Where to train.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    return device_of_name(config.accelerator)


def device_of_name(accelerator: str) -> torch.device:
    """Where to run: cpu, cuda (an NVIDIA GPU), mps (an Apple GPU), or auto: cuda, mps or cpu, the first there is.

    Raises:
        ValueError: another name; a GPU is asked for and there is none.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator: expected one of {', '.join(ACCELERATORS)}, got {accelerator!r}")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator != "auto" and not here[accelerator]:
        raise ValueError(f"accelerator: expected a GPU for {accelerator}, found none")
    return torch.device(next(name for name in here if here[name]) if accelerator == "auto" else accelerator)


def precision_of(config: TrainConfig) -> str:
    """What `precision` stands for here: 32-true or bf16-mixed."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if is_faster_in_bf16(device_of(config)) else "32-true"


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """What the sessions of one run must share."""
    shared = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    return shared | {"precision": precision_of(config), "learning_rate": config.rate}


def learning_rate(config: TrainConfig, update: int, progress: float) -> float:
    """Linear warm-up, then a half cosine from the full rate to `final_rate` of it."""
    warm = min(1.0, (update + 1) / max(1, config.warmup_updates))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.rate * warm * (config.final_rate + (1 - config.final_rate) * cosine)


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The names whose values are not the same in both."""
    return [name for name in sorted(saved.keys() | present.keys()) if saved.get(name) != present.get(name)]


def check_identity(saved: dict[str, Any], present: dict[str, Any], *, new_budget: bool = False) -> None:
    """Refuse to resume a run under another configuration, naming the first value that differs."""
    for name in differences(saved, present):
        if new_budget and name in BUDGET:
            continue
        hint = "; with new_budget it may change" if name in BUDGET else ""
        raise ValueError(
            f"resume: expected {name} = {saved.get(name)!r} as in the checkpoint, got {present.get(name)!r}{hint}"
        )
