"""A memory as the components of a mixture (figure 2B of the paper): learned p(a) and entries, and KL(a) by data.

On MNIST, with one memory for the whole of training and test: uniform p(a) over fixed images; p(a) learned, one
number per entry; and the entries themselves learned too. Then the same networks on MNIST and on Omniglot with
memories of the same size: digits are few components, so that their lookups say less than those of characters.
Writes results.json, report.md and pictures of samples, one entry per row.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import folder, kept, plots, protocols, results
from common.images import save_generated
from common.learned_memory import Components, OneMemory, WithComponents
from common.several import SeveralConfig, small, train_one, train_or_load
from common.train import TrainOptions
from vma_pyro import Guide, Memory, MLPNetworks, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.data import Characters, EpisodeSampler, LabelledImages, Split, load_split, mnist
from vma_pyro.data.episodes import as_images
from vma_pyro.evaluation import Mean, kl_report
from vma_pyro.models import Pair, on
from vma_pyro.program import Program
from vma_pyro.training import TrainConfig, device_of

HELD_OUT = 5000  # of MNIST's training images, for validation
KINDS = {
    "uniform": "uniform p(a), fixed entries",
    "prior": "learned p(a), fixed entries",
    "entries": "learned p(a), learned entries",
}


@dataclass(frozen=True)
class MixtureConfig(SeveralConfig):
    """Train mixtures on MNIST, and compare KL(a) on MNIST and on Omniglot."""

    out: Path = Path("runs/mnist_mixture")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    entries: int = 64
    """|M| of the mixtures on MNIST."""
    classes: int = 8
    """Classes in the memories with which MNIST and Omniglot are compared."""
    shots: int = 4
    """Examples of each class in these memories."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(updates=5000))
    """Training of each model."""

    def resolved(self) -> MixtureConfig:
        """Fill in the tiny sizes, if they are wanted."""
        return replace(self, **small(self), entries=5, classes=2, shots=1) if self.tiny else self


def programs(kind: str, entries: Tensor, latent_dim: int) -> tuple[Pair, Components]:
    """Model and guide of one kind of mixture, on the paper's networks for MNIST."""
    networks = MLPNetworks(latent_dim)
    components = Components(entries, learn_entries=kind == "entries")
    model = Model(networks, address_prior=None if kind == "uniform" else components)
    guide: Program = Guide(networks)
    if kind != "entries":
        return (model, guide), components
    return (WithComponents(model, components), WithComponents(guide, components)), components


def split_images(images: LabelledImages, entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint random parts of the training images: the memory's entries, targets, and those for validation."""
    shuffled = images.shuffled(seed=0).images
    return shuffled[:entries], shuffled[entries:-HELD_OUT], shuffled[-HELD_OUT:]


def mixture(
    config: MixtureConfig, kind: str, images: LabelledImages, test: LabelledImages, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train or load one mixture, take its bound apart, and draw samples of its weightiest entries."""
    torch.manual_seed(config.train.seed)
    first, targets, held_out = split_images(images, config.entries)
    memory = Memory(as_images(torch.from_numpy(first)))
    pair, components = programs(kind, memory.entries, 32)
    validation = OneMemory(held_out, memory, queries=200, seed=1)
    facts = train_one(
        config,
        kind,
        pair,
        OneMemory(targets, memory, queries=config.queries, seed=config.train.seed),
        validation=[validation.sample() for _ in range(4)],
        identity={"entries": config.entries, "kind": kind},
        data="mnist",
        label=KINDS[kind],
    )
    pair, components = on(device, pair), components.to(device)
    todo = partial(take_apart, config, kind, pair, components, memory.to(device), test)
    return facts, kept.once(config, kind, todo)


@torch.no_grad()
def take_apart(
    config: MixtureConfig, kind: str, pair: Pair, components: Components, memory: Memory, test: LabelledImages
) -> dict[str, Any]:
    """Take the bound of test images apart, see what p(a) has become, and draw samples row by row."""
    device = memory.entries.device
    x = as_images(torch.from_numpy(test.shuffled(seed=0).images[: config.images])).to(device)
    report = kl_report(*pair, memory, x, num_samples=config.samples.few)
    prior = components.log_weights.softmax(0)
    own = components.memory(memory).entries
    rows = prior.argsort(descending=True)[:12]
    model: Any = pair[0].program if isinstance(pair[0], WithComponents) else pair[0]
    one_entry = Model(model.networks)  # generates from one entry, whatever p(a) is
    title = "left: entries, the most probable first; right: E[x | z, m] for z from p(z | m)"

    draw = partial(save_generated, model=one_entry, entries=own[rows], title=title)
    plots.drawn(config.out / f"{config.out.name}_{kind}.png", draw)
    names = ("nll", "kl_address", "kl_z", "mutual_information")
    found = {name: getattr(report, name)._asdict() for name in names}
    return {"kind": kind, "perplexity_of_prior": prior.double().log().mul(-prior).sum().exp().item(), **found}


def as_characters(images: LabelledImages) -> Characters:
    """MNIST as characters of ten classes, each cut to as many examples as the rarest has."""
    by_class = [images.images[images.labels == label] for label in np.unique(images.labels)]
    examples = min(map(len, by_class))
    names = tuple(map(str, np.unique(images.labels)))
    return Characters(np.stack([own[:examples] for own in by_class]), names, ("digits",) * len(names))


def few_shot_model(
    config: MixtureConfig, name: str, data: Split, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the few-shot model on one data set and take its bound on test images apart."""
    mine = replace(config, augment="none")  # on digits, turned ones would be new classes of their own
    pair, facts = train_or_load(mine, name, data, classes=config.classes, shots=config.shots)

    def measure() -> dict[str, Any]:
        stream = EpisodeSampler(
            data.test, classes=config.classes, shots=config.shots, queries=100, seed=0, shared_memory=False
        )
        episodes = islice(stream, max(1, config.images // 100))
        names, few = ("nll", "kl_address", "kl_z", "right_class"), config.samples.few
        parts = protocols.split(on(device, pair), episodes, names, num_samples=few, device=device)
        return {"data": name, "log_memory": math.log(config.classes * config.shots), **parts}

    return facts, kept.once(config, name, measure)


def main(config: MixtureConfig) -> None:
    """Train and test all models, and write."""
    start = time.monotonic()
    config = config.resolved()
    if config.data != "omniglot":
        raise ValueError(f"data: expected omniglot, which MNIST is compared with, got {config.data}")
    device = device_of(config.train)
    images, test = (mnist.load(config.data_dir, split=split) for split in ("train", "test"))
    digits = as_characters(images)
    names, half = (digits.names, digits.alphabets), digits.images.shape[1] // 10 * 9
    sets = {
        "mnist": Split(
            Characters(digits.images[:, :half], *names),
            Characters(digits.images[:, half:], *names),
            as_characters(test),
        ),
        "omniglot": load_split("omniglot", config.data_dir),
    }
    folder.begin(config, load=config.load)
    training: dict[str, Any] = {}
    mixtures, comparison = [], []
    for kind in KINDS:
        training[KINDS[kind]], found = mixture(config, kind, images, test, device)
        mixtures.append(found)
    for name, data in sets.items():
        training[name], found = few_shot_model(config, name, data, device)
        comparison.append(found)
    head = results.header(config, since=start, device=device, training=training)
    write({**head, "mixtures": mixtures, "comparison": comparison}, config)


def write(content: dict[str, Any], config: MixtureConfig) -> None:
    """Write results.json and report.md."""
    lines = [
        [KINDS[row["kind"]], *(Mean.read(row[n]) for n in ("kl_address", "kl_z", "nll"))]
        + [f"{row['perplexity_of_prior']:.1f} of {config.entries}"]
        for row in content["mixtures"]
    ]
    samples = [
        f"![Samples, {KINDS[kind]}]({config.out.name}_{kind}.png)"
        for kind in KINDS
        if (config.out / f"{config.out.name}_{kind}.png").exists()
    ]
    about = (
        f"MNIST, one memory of {config.entries} images, log |M| = {math.log(config.entries):.2f}, targets "
        f"never in it; nats per image, mean ± standard error over {config.images} test images; NLL: upper "
        f"bound from {config.samples.few} importance samples."
    )
    head = ["mixture", "KL(a)", "KL(z)", "NLL", "entries in use, exp H(p(a))"]
    by_data = [
        [row["data"], *(Mean.read(row[n]) for n in ("kl_address", "kl_z", "nll"))]
        + [f"{100 * row['right_class']['mean']:.1f}"]
        for row in content["comparison"]
    ]
    again = (
        f"The convolutional networks on both, {config.classes} classes x {config.shots} examples in memory, "
        f"log |M| = {math.log(config.classes * config.shots):.2f}; the target is another example of one of "
        "the classes. MNIST: digits of classes seen in training, unseen images; Omniglot: unseen classes."
    )
    parts = ["## Mixtures", about, table(head, lines), *samples, "## KL(a) by data", again]
    parts.append(table(["data", "KL(a)", "KL(z)", "NLL", "q on the right class, %"], by_data))
    results.write(config.out, content, "A memory as the components of a mixture", parts)


if __name__ == "__main__":
    cli.run(main, MixtureConfig, __doc__)
