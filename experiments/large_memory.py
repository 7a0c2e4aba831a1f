"""Few-shot models that are trained with tens, a thousand and ten thousand entries in memory, for the same time.

A memory holds the targets of its update, each of which is left out for itself; an update encodes the entries
that it has found by keys that are kept, and what else it reads, see `RetrievalGuide`. The models are tested alike,
over all entries of the test memories: the likelihood under one class, classification, and how much of q(a | x) is
on the right class where all images of all test classes are in memory. Before that: how soon kept keys grow old in
training. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from common import aged_keys, kept, plots, protocols, results
from common.peak import peak_so_far
from common.several import Session, SeveralConfig, begin, small, train_one, validation_episodes
from common.train import TrainOptions, make_elbo
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro.data import LeaveOneOutSampler
from vma_pyro.data.episodes import Augmentation
from vma_pyro.evaluation import Mean, TwoPhase
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training import TrainConfig

NAMES = ("right_class", "kl_address", "kl_z")  # of the split over all entries


@dataclass(frozen=True)
class LargeMemoryConfig(SeveralConfig):
    """Train a model for each size of the memory, and test all of them alike."""

    out: Path = Path("runs/large_memory")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    memories: tuple[tuple[int, int], ...] = ((9, 4), (50, 20), (500, 20))
    """Classes and examples of each in the memory of training, for each model."""
    candidates: int = 256
    """Entries that an update encodes, if there are more."""
    refresh_every: int = 500
    """Most updates between two times that all kept keys are made anew."""
    augment: Any = "none"
    """Turned training images as classes of their own: none, rotations or rotations+flips; the test classes are
    never turned."""
    test_shots: tuple[int, ...] = (1, 5, 19)
    """Examples of one class in the test memories."""
    tasks: tuple[tuple[int, int], ...] = ((20, 1), (20, 5))
    """Classes and examples of the classification tasks."""
    all_images: int = 500
    """Targets under a memory of all test images but their own."""
    ages: tuple[int, ...] = (0, 10, 30, 100, 200, 500)
    """Updates since the keys were made, at which the search by them is compared with one by new keys."""
    aged_from: tuple[int, ...] = (200, 800)
    """Updates of training before these keys are made."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(minutes=40.0))
    """Training of each model."""

    def resolved(self) -> LargeMemoryConfig:
        """Fill in the tiny sizes, if they are wanted."""
        sizes: dict[str, Any] = {
            "memories": ((3, 2), (3, 5)),
            "candidates": 6,
            "refresh_every": 2,
            "test_shots": (1, 2),
            "tasks": ((2, 1),),
            "all_images": 2,
            "ages": (0, 1),
            "aged_from": (1,),
        }
        return replace(self, **small(self), **sizes) if self.tiny else self


def build(config: LargeMemoryConfig) -> models.Pair:
    """Model and guide with fresh weights."""
    sizes = {"width": config.width, "latent_dim": config.latent_dim}
    torch.manual_seed(config.train.seed)
    model: Any = models.build({"networks": "conv", **sizes, "program": "memory"})[0]
    return model, RetrievalGuide(model.networks, candidates=config.candidates, least=config.particles)


def episodes(config: LargeMemoryConfig, session: Session, classes: int, shots: int) -> LeaveOneOutSampler:
    """Memories of training; of fewer entries than there are to be targets, as many as there are."""
    augment: Augmentation | None = None if config.augment == "none" else config.augment
    return LeaveOneOutSampler(
        session.data.train,
        classes=classes,
        shots=shots,
        queries=min(config.queries, classes * shots),
        seed=config.train.seed,
        refresh_every=config.refresh_every,
        augment=augment,
    )


def train(
    config: LargeMemoryConfig, session: Session, classes: int, shots: int
) -> tuple[models.Pair, dict[str, Any]]:
    """One model, trained with so many classes and examples in memory."""
    pair = build(config)
    name = f"{classes}x{shots}"
    few = (2, 1) if config.tiny else (12, 3)
    names = ("candidates", "refresh_every", "augment", "width", "latent_dim")
    facts = train_one(
        config,
        name,
        pair,
        episodes(config, session, classes, shots),
        validation=validation_episodes(config, session.data, classes=few[0], shots=few[1]),
        identity={n: getattr(config, n) for n in names} | {"classes": classes, "shots": shots},
        label=f"{classes * shots} entries",
    )
    return pair, facts


def score(pair: models.Pair, session: Session, config: LargeMemoryConfig) -> dict[str, Any]:
    """NLL by shots, accuracy by task, and what q(a | x) does among all test images."""
    nested, device = session.nested, session.device
    found: dict[str, Any] = {"nll": [], "accuracy": []}
    for shots in config.test_shots:
        nll = protocols.nll(pair, partial(nested.episodes, 1, shots), config.samples, device=device)
        found["nll"].append({"shots": shots, **nll.plain()})
    for ways, shots in config.tasks:
        share = protocols.accuracy(pair, nested.episodes(ways, shots), device=device)
        found["accuracy"].append({"ways": ways, "shots": shots, "accuracy": share._asdict()})
    everything = len(session.data.test), nested.examples - 1
    split = protocols.split(
        pair, nested.episodes(*everything, first=config.all_images), NAMES, num_samples=1, device=device
    )
    return found | {"entries": math.prod(everything), "among_all": split, "peak_gib": peak_so_far()}


def grow_old(config: LargeMemoryConfig, session: Session) -> dict[str, Any]:
    """How soon keys grow old in a training of the largest memory."""
    rows = aged_keys.age(
        build(config),
        make_elbo(config.estimator, config.particles),
        episodes(config, session, *config.memories[-1]),
        train=config.train,
        number=max(config.particles, config.candidates // config.queries),
        begins=config.aged_from,
        ages=config.ages,
    )
    return {"rows": rows}


def main(config: LargeMemoryConfig) -> None:
    """Train and test all models, and write."""
    config = config.resolved()
    session = begin(config)
    for classes, shots in config.memories:  # a bad one must not cost a training run
        with cli.option("memories", instead_of="classes"):
            episodes(config, session, classes, shots)
    aged = kept.once(config, "aged", partial(grow_old, config, session))["rows"]
    training, rows = {}, []
    for classes, shots in config.memories:
        pair, facts = train(config, session, classes, shots)
        name = f"{classes}x{shots}"
        training[f"{classes * shots} entries"] = facts
        scores = partial(score, models.on(session.device, pair), session, config)
        found = kept.once(config, f"{name}-scores", scores)
        rows.append({"classes": classes, "shots": shots, "updates": facts.get("updates"), **found})
    head = results.header(config, since=session.since, device=session.device, training=training)
    write({**head, "rows": rows, "aged": aged}, config)


def write(content: dict[str, Any], config: LargeMemoryConfig) -> None:
    """Write results.json, report.md and the picture."""
    rows = content["rows"]
    for row in rows:
        row["nll"] = [
            {"shots": own["shots"], "nll": TwoPhase.read(own).estimate()._asdict()} for own in row["nll"]
        ]
    first = rows[0]
    about = (
        f"Each model trained for the same time, {config.queries} targets per update, K = {config.particles}; an "
        f"update encodes {config.candidates} entries if there are more, found by keys at most "
        f"{config.refresh_every} updates old. {config.samples.about(first['nll'][0]['nll']['n'])} One class in "
        f"memory. In the last columns all test images but the target are in memory, {first['entries']} entries, "
        f"for {config.all_images} targets: q(a|x) on entries of its class, and KL(a)."
    )
    head = ["entries", "updates", *(results.plural(shots, "shot") for shots in config.test_shots)]
    head += [f"{ways}-way {shots}-shot, %" for ways, shots in config.tasks] + ["q on the class, %", "KL(a)"]
    lines = [
        [f"{row['classes']} x {row['shots']}", row["updates"]]
        + [str(Mean.read(cell["nll"])) for cell in row["nll"]]
        + [results.percent(Mean.read(cell["accuracy"])) for cell in row["accuracy"]]
        + [results.percent(Mean.read(row["among_all"]["right_class"]))]
        + [str(Mean.read(row["among_all"]["kl_address"]))]
        for row in rows
    ]
    kept_keys = (
        "Of the entries that are most similar to an image by new keys: the share that is also found by keys made "
        "so many updates before, and of q(a|x) over these entries the share on those found. Constant learning "
        f"rate, {config.memories[-1][0]} x {config.memories[-1][1]} entries, no key replaced meanwhile."
    )
    aged = [
        [row["updates"], row["age"], f"{100 * row['recall']:.1f}", f"{100 * row['mass']:.1f}"]
        for row in content["aged"]
    ]
    picture = results.Picture(
        f"{config.out.name}.png", "NLL by entries in training, and what old keys find", partial(draw, content)
    )
    results.write(
        config.out,
        content,
        "Few-shot models trained with thousands of entries in memory",
        [
            about,
            table(head, lines),
            "## How old keys may be",
            kept_keys,
            table(["updates before", "age, updates", "found, %", "q on those found, %"], aged),
            picture,
        ],
    )


def draw(content: dict[str, Any], path: Path) -> None:
    """NLL by the entries of the memory in training, and what is found by old keys."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for at, cell in enumerate(content["rows"][0]["nll"]):
        points = [(row["classes"] * row["shots"], row["nll"][at]["nll"]["mean"]) for row in content["rows"]]
        left.plot(*zip(*points, strict=True), marker="o", label=results.plural(cell["shots"], "shot"))
    left.set(xscale="log", xlabel="entries in memory in training", ylabel="NLL, nats per image")
    left.legend()
    for begins in dict.fromkeys(row["updates"] for row in content["aged"]):
        own = [row for row in content["aged"] if row["updates"] == begins]
        for name, style in (("recall", "-"), ("mass", "--")):
            right.plot([r["age"] for r in own], [r[name] for r in own], style, label=f"{name}, after {begins}")
    right.set(xscale="symlog", xlabel="age of the keys, updates", ylim=(0, 1.02))
    right.legend(fontsize=7)
    plots.save(figure, path, dpi=120)


if __name__ == "__main__":
    cli.run(main, LargeMemoryConfig, __doc__)
