"""The field's benchmark: estimators train variational autoencoders with 200 bits, or with categorical latents.

Every estimator starts from the same weights and sees the same batches. One run leaves NAME.json in the folder
`out`, a small file with its curve, and NAME.pt to go on from:

uv run experiments/binary_vae.py --estimator disarm rloo --num-particles 2 --updates 100000 --seed 0

Runs of two seeds are two commands. Images are binary already, see `discrete_vae.images`.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.train import Stopped
from discrete_vae.images import load
from discrete_vae.programs import ModelName
from discrete_vae.runs import Job, Schedule, train
from vma_pyro import cli
from vma_pyro._system import lock
from vma_pyro.infer import ESTIMATORS
from vma_pyro.training.stopping import stop_signals


@dataclass(frozen=True)
class BinaryVAEConfig:
    """Train discrete autoencoders with several estimators, one after the other."""

    data: Literal["mnist", "omniglot"] = "mnist"
    """Images, binary already."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    model: ModelName = "linear"
    """200 bits with a linear map each way, with two hidden layers, with these as the authors of RODEO train them
    (batches of 100, Adam at 1e-3, a fixed prior, images not centred), two layers of bits; or so many values in
    each of so many latents."""
    estimator: tuple[str, ...] = ("disarm",)
    """Names of estimators in vma_pyro.infer.ESTIMATORS."""
    num_particles: tuple[int, ...] = (2,)
    """K, one for all or one for each."""
    temperature: float | None = None
    """Of a relaxation; default: the estimator's own."""
    updates: int = 100_000
    """In all; the papers make 1,000,000."""
    minutes: float | None = None
    """Leave with a checkpoint after so many minutes; go on with resume."""
    seed: int = 0
    """Seed of the initial weights, the order of images, and the noise."""
    out: Path = Path("runs/binary_vae")
    """Folder for the files of all runs."""
    resume: bool = False
    """Go on with the runs in the folder `out`; finished ones too, if there are more updates now."""
    evaluate_every: int = 10_000
    """Updates between rows of the curve."""
    elbo_images: int = 10_000
    """Training and validation images whose ELBO a row has, one sample each."""
    bound_images: int = 500
    """Training and validation images whose bound a row has."""
    score_images: int = 2000
    """Images of each set that are scored at the end."""
    samples: int = 100
    """Samples of the bound."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        sizes = ("num_particles", "updates", "evaluate_every", "elbo_images", "bound_images", "score_images")
        cli.check_sizes(self, *sizes, "samples")
        cli.check_factor(self, "minutes")
        cli.check_factor(self, "temperature")
        cli.check_seed(self)
        for name in self.estimator:
            if name not in ESTIMATORS:
                raise ValueError(f"estimator: expected names among {', '.join(ESTIMATORS)}, got {name!r}")
        if len(self.num_particles) not in (1, len(self.estimator)):
            raise ValueError(
                f"num_particles: expected one, or one for each of {len(self.estimator)} estimators, "
                f"got {len(self.num_particles)}"
            )

    def jobs(self) -> list[Job]:
        """The runs, in order."""
        each = self.num_particles * (len(self.estimator) // len(self.num_particles))
        return [
            Job(self.data, self.model, name, k, self.seed, self.temperature)
            for name, k in zip(self.estimator, each, strict=True)
        ]

    def schedule(self) -> Schedule:
        """How long each is, and what is measured on the way."""
        return Schedule(
            self.updates,
            self.evaluate_every,
            self.elbo_images,
            self.bound_images,
            self.score_images,
            self.samples,
            self.checkpoint_seconds,
        )


def main(config: BinaryVAEConfig) -> None:
    """Train, and write."""
    if config.tiny:
        small: dict[str, Any] = {"elbo_images": 8, "bound_images": 4, "score_images": 4, "samples": 5}
        config = replace(config, updates=min(config.updates, 8), evaluate_every=3, **small)
    images = load(config.data, config.data_dir)
    deadline = time.monotonic() + 60 * (config.minutes or float("inf"))
    with stop_signals() as stop:
        for job in config.jobs():
            go_on: Callable[[], bool] = lambda: not stop.signal and time.monotonic() < deadline  # noqa: E731
            with lock.holding(config.out / job.name, argument="out"), cli.option("num_particles", instead_of="K"):
                training = train(job, images, config.schedule(), config.out, resume=config.resume, go_on=go_on)
            if stop.signal:
                raise Stopped(stop.signal, training.update)
            if training.update < config.updates:
                print(f"{job.name}: {training.update} of {config.updates} updates; go on with --resume")
                break


if __name__ == "__main__":
    cli.run(main, BinaryVAEConfig, __doc__)
