"""The main job: train on few-shot episodes, take the bound apart, generate from one example.

Trains a memory model and a memoryless one on the same networks, scores both on unseen classes, and writes
report.md, results.json and pictures. Without options it takes a few minutes on two CPU cores, on procedural
glyphs.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer.elbo import ELBO

from common import folder
from common.train import as_many, freeze_all_but, make_elbo, train_pair
from main_job import rehearsal, scores
from main_job.options import FewShotConfig
from main_job.report import Report, memoryless_beside
from vma_pyro import cli, models
from vma_pyro._system.metrics import tensorboard_writer
from vma_pyro._system.ranks import Ranks
from vma_pyro.data import EpisodeSampler, Split, load_split
from vma_pyro.data.episodes import Augmentation, most_queries
from vma_pyro.data.splits import check_unseen
from vma_pyro.infer import make
from vma_pyro.training import check_shares, device_of
from vma_pyro.training.start import start_from

# What the sessions of one run must share, beside the data, the architecture and how it is trained.
IDENTITY = ("classes", "shots", "queries", "particles", "estimator", "augment", "blank", "shared_memory")


def objective(config: FewShotConfig, *, memory: bool = True) -> ELBO:
    """The objective; without a memory, an estimator that chooses addresses gives way to the plain bound."""
    elbo = make_elbo(config.estimator, config.particles)
    return elbo if memory or not hasattr(elbo, "site") else make("vimco", config.particles)


def classes_of(config: FewShotConfig, data: Split) -> dict[str, Any]:
    """Name the classes to train on where a folder may have others tomorrow, and be divided in another way."""
    return {"trained_on": list(data.train.full_names)} if config.data == "folder" else {}


def samplers(config: FewShotConfig, data: Split) -> tuple[EpisodeSampler, EpisodeSampler]:
    """Episodes to train on, and of held-out classes."""
    augment: Augmentation | None = None if config.augment == "none" else config.augment
    shape: dict[str, Any] = {"classes": config.classes, "shots": config.shots, "queries": config.queries}
    episodes = EpisodeSampler(
        data.train,
        **shape,
        seed=config.train.seed,
        shared_memory=config.shared_memory,
        augment=augment,
        blank=config.blank,
    )
    held_out = data.validation  # which may have fewer classes and examples
    fewer = {"classes": min(shape["classes"], len(held_out)), "shots": min(shape["shots"], held_out.examples - 1)}
    most = most_queries(torch.as_tensor(held_out.counts), **fewer)
    fewer["queries"] = min(shape["queries"], most)
    return episodes, EpisodeSampler(held_out, **fewer, seed=1)


def train(
    config: FewShotConfig, data: Split, folder: Path, *, memory: bool, updates: int | None = None
) -> tuple[models.Pair, dict[str, Any]]:
    """Train one of the two models, or go on with it; without memory for as many updates as the other one."""
    episodes, held_out = samplers(config, data)
    only = {} if config.train_only == "all" or not memory else {"train_only": config.train_only}
    architecture = config.architecture(data.train.image_shape, memory=memory)
    torch.manual_seed(config.train.seed)
    pair = models.build(architecture)
    if only:
        freeze_all_but(pair, config.train_only)
    facts = train_pair(
        pair,
        objective(config, memory=memory),
        episodes,
        config=config.train if updates is None else as_many(config.train, updates),
        folder=folder,
        data=str(config.data),
        validation=[held_out.sample() for _ in range(8)],
        identity={name: getattr(config, name) for name in IDENTITY}
        | only
        | config.preparation()
        | architecture
        | classes_of(config, data),
        init=config.init if memory else None,
        resume=config.resume,
        tensorboard=config.tensorboard,
        label="memory model" if memory else "memoryless model",
    )
    return pair, facts


def main(config: FewShotConfig) -> None:
    """Train (or load), evaluate, write; under `torchrun` all processes train, and the first does the rest."""
    start = time.monotonic()
    config = config.resolved()
    ranks = Ranks.start()
    # The first one downloads, or prepares.
    data = ranks.in_turn(lambda: load_split(str(config.data), config.data_dir, **config.preparation()))
    config = config.fitted(data)
    if config.load is not None:
        check_unseen(models.facts_of(config.load), data)
    rehearse(config, data)
    if ranks.rank == 0:
        folder.make_room(config.out, resume=config.resume, load=config.load)
    ranks.wait()
    device = device_of(config.train)
    training: dict[str, Any] = {}
    if config.load is None:
        pair, training["memory"] = train(config, data, config.out, memory=True)
    else:
        pair = models.load(config.load, program="memory", classes=models.classes_in(config.code))
    if ranks.rank > 0:
        if config.load is None:
            memoryless_pair(config, data, training)
        return
    print("scoring the memory model on unseen classes ...")
    report = Report(config, data, models.on(device, pair), device, start, training)
    report.score()
    # The memory model's report is on disk before its pictures are drawn, and before the memoryless one starts.
    report.write()
    report.draw()
    memoryless = memoryless_pair(config, data, training)
    if memoryless is not None:
        print("scoring the memoryless model on unseen classes ...")
        report.compare(models.on(device, memoryless))
        report.write()
    print((config.out / "report.md").read_text())


def memoryless_pair(config: FewShotConfig, data: Split, training: dict[str, Any]) -> Any:
    """The memoryless model: trained for as many updates as the memory model, or found beside a loaded one."""
    if not config.memoryless:
        return None
    if config.load is not None:
        path = memoryless_beside(config.load)
        if not path.exists():
            return None
        return models.load(path, program="memoryless", classes=models.classes_in(config.code))
    pair, training["memoryless"] = train(
        config, data, config.out / "memoryless", memory=False, updates=training["memory"]["updates"]
    )
    return pair


def rehearse(config: FewShotConfig, data: Split) -> None:
    """Try everything at once: a mistake must not cost a training run, nor move an earlier one aside."""
    config.check()
    assert config.queries is not None  # fitted
    rehearsal.check_images_fit(config.amounts(), data.test.image_shape)
    objective(config)
    device = device_of(config.train)
    check_shares(config.queries, Ranks.present())
    if config.tensorboard:
        tensorboard_writer()
    if config.load is None and config.code is not None:
        raise ValueError(
            f"code: expected it beside load, whose file may name its classes, got {config.code} alone"
        )
    if config.load is not None:
        if config.resume:
            raise ValueError(f"resume: expected no load beside it, as nothing is trained, got {config.load}")
        if config.init is not None:
            raise ValueError(f"init: expected no load beside it, as nothing is trained, got {config.init}")
        pair = models.load(config.load, program="memory", classes=models.classes_in(config.code))
        memoryless = memoryless_pair(config, data, {})
    else:
        architectures = [config.architecture(data.train.image_shape, memory=memory) for memory in (True, False)]
        rehearsal.check_weights_fit(architectures[0], device)
        with torch.random.fork_rng(devices=[]):
            pair, memoryless = (models.build(architecture) for architecture in architectures)
        if config.init is not None:
            start_from(config.init, pair)
        if config.train_only != "all":
            freeze_all_but(pair, config.train_only)
        samplers(config, data)
        few = samplers(replace(config, queries=min(4, config.queries or 4)), data)[0].sample()
        elbo, sizes = (
            partial(make_elbo, config.estimator),
            {"particles": config.particles, "queries": config.queries},
        )
        with rehearsal.on_two_images():
            rehearsal.check_update_fits(models.on(device, pair), elbo, few, **sizes, device=device)
    with tempfile.TemporaryDirectory() as folder, rehearsal.on_two_images():
        two = replace(config, eval_images=2, eval_samples=2, eval_queries=2, out=Path(folder))
        report = Report(two, data, models.on(device, pair), device, time.monotonic(), {})
        report.score()
        rehearsal.check_scores(report.pair, report.scores, data.test, report.amounts, device)
        report.write_pages()  # pictures need no rehearsal: none costs a report
        if config.memoryless and memoryless is not None:
            scores.likelihood_scores(models.on(device, memoryless), data.test, report.amounts, device=device)


if __name__ == "__main__":
    cli.run(main, FewShotConfig, __doc__)
