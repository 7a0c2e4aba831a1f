"""What a memory is worth under a likelihood: NLL with and without it, what z and the address say, and samples.

Every model is tested on the same images. Class fidelity is the share of images generated from one example that a
judge, the same for all, finds to be of its class among others; beside it the share of the real examples, and how
much what is generated varies, relative to real images. NLLs of different likelihoods stand on one page because a
sharper one lets z and m do less, and that is what this page is about; no other page compares them. What a memory
is worth is the NLL of a blank one, which only a model that was trained with some (`few_shot.py --blank`) knows,
less that of one with examples. Writes results.json, report.md and pictures.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common import folder, images, kept, protocols, results
from common.subject import TestConfig
from common.train import loaded_facts
from vma_pyro import cli, models, pretrained
from vma_pyro.data import Episode, ImageClasses, NestedEpisodes, split_of
from vma_pyro.data.splits import check_unseen
from vma_pyro.training import device_of_name
from worth import page
from worth.page import FIGURES, name_of
from worth.scores import diversity, knows_none, nlls


@dataclass(frozen=True)
class LikelihoodsConfig(TestConfig):
    """Compare models by what their likelihoods leave to z and the memory."""

    out: Path = Path("runs/likelihoods")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    others: tuple[Path, ...] = ()
    """Checkpoints of the models to compare it with, trained on the same data."""
    judge: Path = models.PRETRAINED
    """Checkpoint of the model whose guide judges what is generated, or the word pretrained."""
    split: Literal["validation", "test"] = "test"
    """Classes to test on: those that choose between models, or those that are looked at once, at the end."""
    shots: tuple[int, ...] = (1, 5, 19)
    """Examples of one class at which the NLL is measured."""
    images: int = 300
    """Targets."""
    refine: int = 0
    """Steps of refinement of q(z | x, m) for each of the corrected images, for NLLs in columns of their own."""
    without: bool = False
    """Also the NLL of a blank memory, of models that were trained with some, and what a memory is worth: where
    these were few, it is said to be worth too much."""
    joint: bool = False
    """Also the joint measure: the mean of the NLLs with 0 to 19 examples of the class in memory."""
    diverse: int = 100
    """Classes by which the diversity of samples is measured."""
    ways: int = 20
    """Classes of the memory in which the judge looks, with one example each; also of the accuracy."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        super().__post_init__()
        cli.check_sizes(self, "refine", least=0)

    def resolved(self) -> LikelihoodsConfig:
        """Fill in the tiny sizes, if they are wanted."""
        if not self.tiny:
            return self
        small: dict[str, Any] = {"shots": (1, 2), "images": 5, "ways": 3, "refine": 1, "diverse": 2}
        return replace(self, **small, samples=protocols.TINY)


def first(episodes: Iterator[Episode]) -> Episode:
    """The episode, where all targets are one."""
    return next(iter(episodes))


def score(
    subjects: Mapping[str, models.Pair],
    training: Mapping[str, Any],
    judge: Any,
    config: LikelihoodsConfig,
    test: ImageClasses,
    device: torch.device,
    item: tuple[str],
) -> dict[str, Any]:
    """Every figure of one model."""
    pair, nested = subjects[item[0]], NestedEpisodes(test, images=config.images, seed=config.seed)
    within = nested.episodes(min(8, len(test)), min(4, nested.examples - 1))
    diverse = diversity(pair, judge, test, config, device)
    made = {
        **nlls(pair, nested, config, device, knows_none=config.without and knows_none(training[item[0]])),
        "split": protocols.split(pair, within, FIGURES, num_samples=config.samples.few, device=device),
        "accuracy": protocols.accuracy(pair, nested.episodes(config.ways, 1), device=device)._asdict(),
        "fidelity": protocols.fidelity(
            pair, judge, nested.episodes(config.ways, 1), seed=config.seed, device=device
        ),
        "diversity": {name: value._asdict() for name, value in diverse._asdict().items()},
    }
    return {"model": item[0], "likelihood": models.likelihood_of(pair[0]), **made}


def main(config: LikelihoodsConfig) -> None:
    """Test every model, and write."""
    start = time.monotonic()
    config = config.resolved()
    device = device_of_name(config.accelerator)
    paths = (config.load, *config.others)
    subjects = {name_of(path): models.on(device, models.load(path, program="memory")) for path in paths}
    if len(subjects) < len(paths):
        raise ValueError(f"others: expected models of different folders, got {', '.join(map(name_of, paths))}")
    training = {name: loaded_facts(path) for name, path in zip(subjects, paths, strict=True)}
    data = {str(facts.get("data")) for facts in training.values()}
    if len(data) > 1:
        raise ValueError(f"others: expected models of the same data, got {', '.join(sorted(data))}")
    found = split_of(next(iter(training.values())), config.data_dir)
    for facts in training.values():
        check_unseen(facts, found)
    test = found.validation if config.split == "validation" else found.test
    if not 2 <= config.ways <= len(test):
        raise ValueError(f"ways: expected 2 to {len(test)}, the {config.split} classes, got {config.ways}")
    judge = models.load(config.judge, program="memory")[1].to(device)
    files = [pretrained.file_of(path) for path in (*paths, config.judge)]
    folder.begin(config, load=config.load, files=files)
    todo = partial(score, subjects, training, judge, config, test, device)
    with config.arithmetic(device):
        rows = kept.each(config, [(name,) for name in subjects], todo, unit="model")
    head = results.header(config, since=start, device=device, training=training)
    entries = first_targets(test, config).to(device)
    page.write({**head, "rows": rows}, config, partial(draw, subjects, entries, test.bits == 1))


def first_targets(test: ImageClasses, config: LikelihoodsConfig) -> Tensor:
    """The first targets, [N, C, height, width]."""
    e = first(NestedEpisodes(test, images=min(8, config.images), seed=config.seed).episodes(1, 1))
    return e.x


def draw(subjects: Mapping[str, models.Pair], entries: Tensor, ink: bool, path: Path) -> None:
    """Draw what each model generates from the same entries, as it is drawn and not as expected."""
    drawn = (images.generate(model, entries, number=4).drawn for model, _ in subjects.values())
    made = [images.pixels(found, ink=ink) for found in drawn]
    title = "an entry of an unseen class | draws of x by " + ", ".join(subjects)
    images.save_samples(path, images.pixels(entries, ink=ink), made, title=title)


if __name__ == "__main__":
    cli.run(main, LikelihoodsConfig, __doc__)
