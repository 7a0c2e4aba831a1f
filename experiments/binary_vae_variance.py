"""The variance of estimators' gradients along one run of a discrete autoencoder, the same points for all.

One estimator trains; at some of its updates the gradients of all are drawn on one batch. Leaves
variance-DATA-MODEL-ESTIMATOR-SEED.json in the folder `out`, which `binary_vae_page.py` reads.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from common import results
from discrete_vae.images import Batches, Images, load
from discrete_vae.programs import ModelName
from discrete_vae.runs import Job, Schedule, Training, make_elbo, train
from discrete_vae.variance import measure
from vma_pyro import cli
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro.infer.comparison.compare import evaluations_of

# By runs of the model: one, two, four.
DEFAULT = (
    *("reinforce:1", "reinmax:1", "straight-through-plain:1"),
    *("rloo:2", "arm:2", "disarm:2", "double-cv:2"),
    *("rloo:4", "disarm:4", "arms:4", "double-cv:4", "vimco:4", "local-disarm:2"),
)


@dataclass(frozen=True)
class VarianceConfig:
    """Measure the variance of gradients."""

    data: Literal["mnist", "omniglot"] = "mnist"
    """Images, binary already."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    model: ModelName = "linear"
    """As in `binary_vae.py`."""
    trajectory: str = "disarm"
    """The estimator that trains, with 2 particles."""
    at: tuple[int, ...] = (0, 1000, 10_000, 100_000)
    """Updates at which gradients are measured."""
    estimators: tuple[str, ...] = DEFAULT
    """Whose, as NAME:K."""
    draws: int = 200
    """Gradients of each at each point."""
    warm_up: int = 200
    """Gradients before, from which estimators learn."""
    seed: int = 0
    """Seed of the run, and of the draws."""
    out: Path = Path("runs/binary_vae_variance")
    """Folder for the file and the run."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        cli.check_sizes(self, "draws", least=2)
        cli.check_sizes(self, "at", "warm_up", least=0)
        cli.check_seed(self)
        for name in self.estimators:
            if not name.partition(":")[2].isdigit():
                raise ValueError(f"estimators: expected NAME:K, got {name!r}")


def rows_at(config: VarianceConfig, training: Training, images: Images) -> list[dict[str, Any]]:
    """Measure all estimators at one point of the run."""
    rows = []
    few = (images.train[:4].float(),)
    for name in tqdm(config.estimators, desc=f"variance at update {training.update}"):
        estimator, _, k = name.partition(":")
        job = Job(config.data, config.model, estimator, int(k), config.seed)
        programs = training.programs
        elbo = make_elbo(job, programs)
        cost = evaluations_of(copy.deepcopy(elbo), programs.model, programs.guide, few)
        batches = Batches(images.train, training.batches.size, config.seed + 1)
        found = measure(elbo, programs, batches, draws=config.draws, warm_up=config.warm_up, seed=config.seed)
        row: dict[str, Any] = {"update": training.update, "estimator": estimator, "num_particles": int(k)}
        row |= {"objective": elbo.objective, "unbiased": elbo.unbiased, "evaluations": cost}
        rows.append(row | {part: value._asdict() for part, value in found.items()})
    return rows


def main(config: VarianceConfig) -> None:
    """Train, measure and write."""
    if config.tiny:
        config = replace(config, at=(0, 3), draws=3, warm_up=2)
    images = load(config.data, config.data_dir)
    job = Job(config.data, config.model, config.trajectory, 2, config.seed)
    lock.take(config.out, argument="out")
    rows: list[dict[str, Any]] = []
    for number, updates in enumerate(sorted(set(config.at))):
        small = {"elbo_images": 1, "bound_images": 1, "score_images": 2, "samples": 2}
        schedule = Schedule(updates, max(1, updates), checkpoint_seconds=60.0, **small)
        training = train(job, images, schedule, config.out / "run", resume=config.resume or number > 0)
        if training.update > updates:
            raise ValueError(f"at: expected updates after those of the run in {config.out}, got {updates}")
        rows += rows_at(config, training, images)
    content = {
        "data": config.data,
        "model": config.model,
        "trajectory": config.trajectory,
        "trajectory_particles": job.num_particles,
        "seed": config.seed,
        "draws": config.draws,
        "warm_up": config.warm_up,
        "rows": rows,
    }
    name = f"variance-{config.data}-{config.model}-{config.trajectory}-{config.seed}.json"
    write_text(config.out / name, results.to_json(content))


if __name__ == "__main__":
    cli.run(main, VarianceConfig, __doc__)
