"""What the laboratory compares: the candidates, the sizes, and the one pair of programs that all start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vma_pyro import cli
from vma_pyro.data import EpisodeSampler, ImageClasses
from vma_pyro.models import Pair, build


class Candidate(NamedTuple):
    """Says who trains: an estimator, K, images per update, learning rate."""

    estimator: str
    num_particles: int = 4
    queries: int = 32
    learning_rate: float = 2.1e-3

    @property
    def folder(self) -> str:
        """Name of the folder of its training run."""
        return "-".join(map(str, self))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, beside the learning rate, which is an option of training."""
        return {"estimator": self.estimator, "particles": self.num_particles, "queries": self.queries}


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
    Candidate("double-cv"),
    Candidate("double-cv+common"),
    Candidate("disarm-tree"),
    Candidate("disarm-tree+common"),
    Candidate("priority"),
    Candidate("reinmax"),
    Candidate("rebar", 1),  # three runs of the model
    Candidate("relax", 1),
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
    "double-cv",
    "double-cv+common",
    "disarm-tree",
    "disarm-tree+common",
    "priority",
    "reinmax",
    "rebar",
    "relax",
)
SWEPT = ("vimco", "loo", "loo+dreg", "rloo", "vimco+common")


class Plan(NamedTuple):
    """What follows from the configuration: who trains and is measured, under which budgets and memories."""

    trained: tuple[Candidate, ...]
    measured: tuple[str, ...]
    particles: tuple[int, ...]
    memories: tuple[int, ...]
    latent_dim: int
    classes: int
    shots: int


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
    redraw: bool = False
    """Write the page and draw the pictures again, from the estimators.json in the folder `out`; nothing else."""
    estimators: tuple[str, ...] = ()
    """Only these of the estimators that are trained and measured, beside VIMCO; default: all."""
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
    """Seed of weights, episodes and draws."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        cli.check_sizes(self, "final_seeds", "draws", "images", "test_images", "test_samples")
        cli.check_factor(self, "width")
        cli.check_factor(self, "minutes")
        cli.check_seed(self)
        known = {candidate.estimator for candidate in TRAINED} | {*MEASURED}
        for name in self.estimators:
            if name not in known:
                raise ValueError(f"estimators: expected names among {', '.join(sorted(known))}, got {name!r}")

    def resolved(self) -> LaboratoryConfig:
        """Fill in the defaults of the data, or the tiny sizes."""
        if not self.tiny:
            final: tuple[float, ...]
            minutes, final = (1.0, (4.0, 8.0)) if self.data == "omniglot" else (0.7, (2.0,))
            final = tuple(sorted(set(self.final_minutes or final)))
            return replace(self, minutes=self.minutes or minutes, final_minutes=final)
        sizes: dict[str, Any] = {"width": 0.1, "draws": 2, "images": 3, "test_images": 4, "test_samples": 2}
        return replace(self, minutes=0.01, final_minutes=(0.01, 0.02), **sizes)

    def plan(self) -> Plan:
        """Plan all of the comparison, or a little of everything."""
        if self.tiny:
            tiny = (
                Candidate("vimco", 2, 4),
                Candidate("vimco+dreg+resampled", 2, 4),
                Candidate("pyro-enum", 2, 4),
            )
            return Plan(tiny, ("vimco", "loo", "wake-wake"), (2, 4), (8,), 4, 3, 2)
        trained = [c for c in TRAINED if not self.estimators or c.estimator in self.estimators]
        trained = [TRAINED[0], *(c for c in trained if c != TRAINED[0])]  # by which the others are judged
        measured = [n for n in MEASURED if not self.estimators or n in (TRAINED[0].estimator, *self.estimators)]
        return Plan(tuple(trained), tuple(measured), (2, 4, 8, 16, 32, 64), (8, 32, 128), 64, 12, 3)


def initial_pair(config: LaboratoryConfig) -> Pair:
    """Make model and guide with the same initial weights for every estimator."""
    sizes = {"width": config.width, "latent_dim": config.plan().latent_dim}
    torch.manual_seed(config.seed)
    return build({"networks": "conv", "program": "memory", **sizes})


def sampler(config: LaboratoryConfig, characters: ImageClasses, queries: int, **options: Any) -> EpisodeSampler:
    """Make episodes of the shape that all are trained on."""
    plan = config.plan()
    shape: dict[str, Any] = {"classes": plan.classes, "shots": plan.shots, "queries": queries} | options
    return EpisodeSampler(characters, seed=shape.pop("seed", config.seed), **shape)
