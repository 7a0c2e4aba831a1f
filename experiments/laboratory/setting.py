"""What is compared: the candidates, the sizes, the data, and the one pair of programs that all start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vma_pyro import cli
from vma_pyro.data import Characters, EpisodeSampler, glyphs, omniglot
from vma_pyro.guide import Guide
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks


class Candidate(NamedTuple):
    """Who trains: an estimator, K, images per update, learning rate."""

    estimator: str
    num_particles: int = 4
    queries: int = 32
    learning_rate: float = 2.1e-3

    @property
    def folder(self) -> str:
        """Of its training run."""
        return "-".join(map(str, self))


# All train the same model. K times images is 128 for all that draw, but for those whose particles cost less than a
# run of the model, and for one VIMCO that has their K and images. VIMCO gets further learning rates.
TRAINED = (
    Candidate("vimco"),
    Candidate("vimco", 4, 32, 1.5e-3),
    Candidate("vimco", 4, 32, 3e-3),
    Candidate("vimco", 2, 64),
    Candidate("vimco", 4, 64),
    Candidate("vimco+dreg"),
    Candidate("vimco+dreg", 2, 64),
    Candidate("vimco+resampled", 4, 64),
    Candidate("vimco+dreg+resampled", 4, 64),
    Candidate("vimco+dreg+resampled", 4, 64, 3e-3),
    Candidate("vimco+stl"),
    Candidate("loo"),
    Candidate("loo+dreg"),
    Candidate("ovis"),
    Candidate("rloo"),
    Candidate("vimco+common"),
    Candidate("distinct+wake"),
    Candidate("unordered-set"),
    Candidate("pyro-graph"),
    Candidate("pyro-enum"),
    Candidate("wake-wake"),
    Candidate("gumbel-softmax"),
    Candidate("reinforce"),
)
MEASURED = (
    "reinforce",
    "nvil",
    "vimco",
    "vimco-geometric",
    "loo",
    "ovis",
    "vimco+dreg",
    "loo+dreg",
    "vimco+stl",
    "vimco+resampled",
    "vimco+dreg+resampled",
    "vimco+common",
    "distinct",
    "distinct+wake",
    "rloo",
    "unordered-set",
    "sum-and-sample",
    "pyro-graph",
    "pyro-enum",
    "wake-wake",
    "tvo",
    "gumbel-softmax",
    "straight-through",
)
SWEPT = ("vimco", "loo", "loo+dreg", "rloo", "vimco+common")


@dataclass(frozen=True)
class LaboratoryConfig:
    """Compare gradient estimators."""

    data: Literal["glyphs", "omniglot"] = "glyphs"
    """Procedural glyphs, or Omniglot."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    out: Path = Path("runs/estimators")
    """Folder for runs and results."""
    resume: bool = False
    """Go on with what is in the folder `out`."""
    minutes: float | None = None
    """Training time of VIMCO; all others get its number of decoder evaluations, and 1.5 times its time at most.
    Default: 0.7 for glyphs, 1 for Omniglot."""
    final_minutes: tuple[float, ...] | None = None
    """Training times of VIMCO in the final, shortest first; the best of the others gets as many updates as fit in
    half of each. Default: 2 for glyphs, 4 and 8 for Omniglot."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps per convolution."""
    final_seeds: int = 2
    """Repetitions of the final, each with weights, episodes and draws of its own."""
    draws: int = 30
    """Gradients per estimator and table."""
    images: int = 8
    """Images per gradient in the tables."""
    test_images: int = 500
    """Test images."""
    test_samples: int = 100
    """Importance samples per test image."""
    seed: int = 0
    """Of weights, episodes and draws."""
    tiny: bool = False
    """Everything once, as small as it gets, to see that it runs."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        cli.check_sizes(self, "final_seeds", "draws", "images", "test_images", "test_samples")
        cli.check_factor(self, "width")
        cli.check_factor(self, "minutes")
        cli.check_seed(self)

    def resolved(self) -> LaboratoryConfig:
        """With the defaults of the data, or the sizes of `tiny`."""
        if not self.tiny:
            final: tuple[float, ...]
            minutes, final = (1.0, (4.0, 8.0)) if self.data == "omniglot" else (0.7, (2.0,))
            final = tuple(sorted(set(self.final_minutes or final)))
            return replace(self, minutes=self.minutes or minutes, final_minutes=final)
        sizes: dict[str, Any] = {"width": 0.1, "draws": 2, "images": 3, "test_images": 4, "test_samples": 2}
        return replace(self, minutes=0.01, final_minutes=(0.01, 0.02), **sizes)


class Plan(NamedTuple):
    """What follows from the configuration."""

    trained: tuple[Candidate, ...]
    measured: tuple[str, ...]
    particles: tuple[int, ...]
    memories: tuple[int, ...]
    latent_dim: int
    classes: int
    shots: int


def plan_of(config: LaboratoryConfig) -> Plan:
    """All of it, or a little of everything."""
    if config.tiny:
        tiny = (Candidate("vimco", 2, 4), Candidate("vimco+dreg+resampled", 2, 4), Candidate("pyro-enum", 2, 4))
        return Plan(tiny, ("vimco", "loo", "rloo", "wake-wake"), (2, 4), (8, 12), 4, 3, 2)
    return Plan(TRAINED, MEASURED, (2, 4, 8, 16, 32, 64), (8, 32, 128), 64, 12, 3)


class Data(NamedTuple):
    """Disjoint classes."""

    train: Characters
    validation: Characters
    test: Characters


def load(config: LaboratoryConfig, name: str) -> Data:
    """Training, validation and test classes."""
    if name == "omniglot":
        return Data(*(omniglot.load(config.data_dir, split=s) for s in ("train", "validation", "evaluation")))
    everything, test = glyphs.load(classes=300, seed=0), glyphs.load(classes=100, seed=1)
    held_out = sorted(set(everything.alphabets))[-2:]
    return Data(everything.without_alphabets(held_out), everything.of_alphabets(held_out), test)


def build(config: LaboratoryConfig) -> tuple[Model, Guide]:
    """The same initial weights for every estimator."""
    torch.manual_seed(config.seed)
    networks = ConvNetworks(plan_of(config).latent_dim, width=config.width)
    return Model(networks), Guide(networks)


def sampler(config: LaboratoryConfig, characters: Characters, queries: int, **options: Any) -> EpisodeSampler:
    """Episodes of the shape that all are trained on."""
    plan = plan_of(config)
    shape: dict[str, Any] = {"classes": plan.classes, "shots": plan.shots, "queries": queries} | options
    return EpisodeSampler(characters, seed=shape.pop("seed", config.seed), **shape)
