"""Recall on MNIST (figure 2A of the paper): does a model whose target is one of the entries learn to look it up?

One that does pays log|M| nats for the address and nothing else: KL(a) and minus the bound both go to log|M|, and
KL(z) to 0, without annealing. It is then given memories of images that it has never seen, and larger ones. With
`--candidates` an update encodes only so many entries, and the memory may be all training images. Writes report.md,
results.json and a picture of training.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common import folder, plots, protocols, results
from common.train import TrainOptions, make_elbo, train_pair
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import LabelledImages, RecallSampler, mnist
from vma_pyro.evaluation import Mean
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training import TrainConfig, device_of

HELD_OUT = 5000  # of the training images, for validation


@dataclass(frozen=True)
class RecallConfig:
    """Train a model that looks up its targets, then enlarge its memory."""

    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder, where
    MNIST is downloaded to."""
    out: Path = Path("runs/mnist_recall")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    load: Path | None = None
    """Report on this checkpoint, without training."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    memory: int = 256
    """|M| in training. Of more than are left beside 5,000 for validation it is all training images, and the last
    weights are those that count."""
    candidates: int = 0
    """Entries that an update encodes, found by keys that are kept from earlier ones, see `RetrievalGuide`. 0: all
    of the memory."""
    refresh_every: int = 500
    """Most updates between two times that all kept keys are made anew."""
    copies: bool = True
    """Whether the logits also get the pixels of the entry. Without them, as in the paper, the decoder's bottleneck
    of 128 units decides how exactly an entry is recalled."""
    queries: int = 128
    """Images per update."""
    particles: int = 4
    """K of the multi-sample bound."""
    estimator: str = "vimco"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(optimizer="adam"))
    """Training. Without a budget: 20 minutes. Adam, as in the paper: recall has a sharp optimum, which the equally
    large steps of Muon leave when they begin (seen with 60,000 entries)."""
    memories: tuple[int, ...] = (256, 512, 1024, 2048)
    """|M| of the tests on unseen images."""
    eval_images: int = 1000
    """Targets per test."""
    eval_samples: int = 100
    """Importance samples per target."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        sizes = "memory", "queries", "particles", "memories", "eval_images", "eval_samples", "refresh_every"
        cli.check_sizes(self, *sizes)
        if self.candidates < 0:
            raise ValueError(f"candidates: expected 0 or more, got {self.candidates}")

    def resolved(self) -> RecallConfig:
        """Fill in the defaults, and the tiny sizes if they are wanted."""
        config = self
        if config.tiny:
            steps = replace(config.train, updates=3, log_every=1, validate_every=2, validation_samples=1)
            config = replace(
                config, memory=6, queries=4, train=steps, memories=(6, 9), eval_images=5, eval_samples=3
            )
        if config.train.updates is None and config.train.minutes is None:
            config = replace(config, train=replace(config.train, minutes=20.0))
        return config


def build(config: RecallConfig) -> tuple[models.Pair, dict[str, Any]]:
    """Model and guide with fresh weights, and what a resumed run must share."""
    architecture = {"networks": "mlp", "latent_dim": 32, "copies": config.copies, "program": "memory"}
    torch.manual_seed(config.train.seed)
    pair: Any = models.build(architecture)
    if config.candidates:
        guide = RetrievalGuide(pair[0].networks, candidates=config.candidates, least=config.particles)
        pair = pair[0], guide
    names = ["memory", "queries", "particles", "estimator"]
    names += ["candidates", "refresh_every"] if config.candidates else []
    return pair, {name: getattr(config, name) for name in names} | architecture


def train(config: RecallConfig, images: LabelledImages) -> tuple[models.Pair, dict[str, Any]]:
    """Train the model, or go on with it."""
    shuffled = images.shuffled(seed=0).images
    all_of_them = config.memory > len(shuffled) - HELD_OUT
    seen, held_out = (shuffled, shuffled) if all_of_them else (shuffled[:-HELD_OUT], shuffled[-HELD_OUT:])
    validation = RecallSampler(held_out, size=min(config.memory, HELD_OUT), queries=config.queries, seed=1)
    pair, identity = build(config)
    facts = train_pair(
        pair,
        make_elbo(config.estimator, config.particles),
        RecallSampler(
            seen,
            size=config.memory,
            queries=config.queries,
            seed=config.train.seed,
            refresh_every=config.refresh_every if config.candidates else None,
        ),
        config=config.train,
        folder=config.out,
        data="mnist",
        validation=[] if all_of_them else [validation.sample() for _ in range(4)],
        identity=identity,
        resume=config.resume,
        label="recall",
    )
    updates = max(1, facts["updates"])
    each = {"milliseconds_per_update": 1000 * facts["training_seconds"] / updates}
    return pair, facts | each


def test(pair: models.Pair, images: LabelledImages, size: int, config: RecallConfig) -> dict[str, Any]:
    """The bound taken apart, over memories of `size` images until there are enough targets."""
    sampler = RecallSampler(images.images, size=size, queries=min(size, config.eval_images), seed=0)
    episodes = islice(sampler, -(-config.eval_images // sampler.queries))
    names = ("nll", "kl_address", "kl_z", "reconstruction", "right_class")
    device = device_of(config.train)
    parts = protocols.split(pair, episodes, names, num_samples=config.eval_samples, device=device)
    return {"memory": size, "log_memory": math.log(size), **parts}


def write(content: dict[str, Any], config: RecallConfig) -> None:
    """Write results.json, report.md and the curve of training."""
    parts = ("kl_address", "kl_z", "reconstruction", "nll")
    rows = [
        [row["images"], row["memory"], f"{row['log_memory']:.3f}"]
        + [str(Mean.read(row[name])) for name in parts]
        + [f"{100 * row['right_class']['mean']:.1f}"]
        for row in content["tests"]
    ]
    head = "images", "S", "log S", "KL(a)", "KL(z)", "minus reconstruction", "NLL", "q on the right entry, %"
    how = "with" if config.copies else "without"
    drawn = "all images" if config.memory == content["training_images"] else "drawn afresh for each update"
    trained = (
        f"Networks {how} a path from the pixels of the entry to the logits; S = |M| = {config.memory} in "
        f"training, {drawn}; K = {config.particles}, {config.estimator}, "
        f"{config.queries} targets per update, no annealing."
    )
    if config.candidates:
        trained += (
            f" An update encodes {config.candidates} entries, found by keys that are made anew "
            f"at least every {config.refresh_every} updates, and where they were encoded; tests compare with "
            "every entry."
        )
    about = (
        f"Nats per image, mean ± standard error over {config.eval_images} targets; the NLL is an upper bound "
        f"from {config.eval_samples} importance samples. A model that only looks up pays log S for KL(a) and "
        "NLL, and 0 for the rest."
    )
    picture = f"{config.out.name}.png"
    curve = content["curve"]
    training = results.Picture(
        picture,
        "Bound, KL(a) and KL(z) in training",
        lambda path: plots.save_training(path, {"recall": curve}, log_memory=math.log(config.memory)),
    )
    results.write(
        config.out,
        content,
        "Recall on MNIST: the target is one of the entries",
        [trained, about, table(head, rows), *([training] if curve else [])],
    )


def main(config: RecallConfig) -> None:
    """Train or load, test, and write."""
    start = time.monotonic()
    config = config.resolved()
    images, unseen = (mnist.load(config.data_dir, split=split) for split in ("train", "test"))
    for data, size, name in (
        (images, config.memory, "memory"),
        *((unseen, size, "memories") for size in config.memories),
    ):
        # A bad one must not cost a training run.
        with cli.option(name, instead_of="size"):
            RecallSampler(data.images, size=size, queries=min(size, config.queries), seed=0)
    make_elbo(config.estimator, config.particles)
    folder.make_room(config.out, resume=config.resume, load=config.load)
    if config.load is None:
        pair, facts = train(config, images)
    else:
        pair = models.load(config.load, program="memory")
        facts = {"loaded_from": str(config.load)}
    device = device_of(config.train)
    pair = models.on(device, pair)
    tests = [{"images": "training"} | test(pair, images, config.memory, config)]
    tests += [{"images": "unseen"} | test(pair, unseen, size, config) for size in config.memories]
    content = {
        **results.header(config, since=start, device=device, training={"recall": facts}),
        "training_images": len(images),
        "tests": tests,
        "curve": read_metrics(config.out / "metrics.jsonl"),
    }
    write(content, config)


if __name__ == "__main__":
    cli.run(main, RecallConfig, __doc__)
