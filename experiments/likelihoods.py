"""What a likelihood costs and brings: NLL, what is left to z and the address, and the class of samples.

Every model is tested on the same images. Class fidelity is the share of images generated from one example that a
judge, the same for all, finds to be of its class among others; beside it the share of the real examples. NLLs of
different likelihoods stand on one page because a sharper one lets z and m do less, and that is what this page is
about; no other page compares them. Writes results.json, report.md and a picture.
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
from vma_pyro._system.markdown import table
from vma_pyro.data import Episode, ImageClasses, NestedEpisodes, split_of
from vma_pyro.data.splits import check_unseen
from vma_pyro.evaluation import Mean
from vma_pyro.training import device_of_name

FIGURES = ("kl_z", "kl_address", "right_class")


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
    ways: int = 20
    """Classes of the memory in which the judge looks, with one example each; also of the accuracy."""

    def resolved(self) -> LikelihoodsConfig:
        """Fill in the tiny sizes, if they are wanted."""
        if not self.tiny:
            return self
        return replace(self, shots=(1,), images=5, ways=3, samples=protocols.TINY)


def first(episodes: Iterator[Episode]) -> Episode:
    """The episode, where all targets are one."""
    return next(iter(episodes))


def score(
    subjects: Mapping[str, models.Pair],
    judge: Any,
    config: LikelihoodsConfig,
    test: ImageClasses,
    device: torch.device,
    item: tuple[str],
) -> dict[str, Any]:
    """Every figure of one model."""
    pair, nested = subjects[item[0]], NestedEpisodes(test, images=config.images, seed=config.seed)
    nll = {
        str(shots): protocols.nll(pair, partial(nested.episodes, 1, shots), config.samples, device=device)
        for shots in config.shots
    }
    within = nested.episodes(min(8, len(test)), min(4, nested.examples - 1))
    made = {
        "nll": {shots: found.estimate()._asdict() for shots, found in nll.items()},
        "split": protocols.split(pair, within, FIGURES, num_samples=config.samples.few, device=device),
        "accuracy": protocols.accuracy(pair, nested.episodes(config.ways, 1), device=device)._asdict(),
        "fidelity": protocols.fidelity(
            pair, judge, nested.episodes(config.ways, 1), seed=config.seed, device=device
        ),
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
    rows = kept.each(
        config,
        [(name,) for name in subjects],
        partial(score, subjects, judge, config, test, device),
        unit="model",
    )
    head = results.header(config, since=start, device=device, training=training)
    entries = first_targets(test, config).to(device)
    write({**head, "rows": rows}, config, partial(draw, subjects, entries, test.bits == 1))


def name_of(path: Path) -> str:
    """A model by the folder of its run."""
    return path.parent.name if path.name in ("model.pt", "checkpoint.pt") else path.stem


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


def write(content: dict[str, Any], config: LikelihoodsConfig, picture: Any) -> None:
    """Write results.json, report.md and the picture."""
    lines = []
    for row in content["rows"]:
        nll = [str(Mean.read(row["nll"][str(shots)])) for shots in config.shots]
        kl_z, kl_a, right = (Mean.read(row["split"][name]) for name in FIGURES)
        shares = (row["accuracy"], row["fidelity"]["generated"])
        lines.append(
            [
                row["model"],
                row["likelihood"],
                *nll,
                str(kl_z),
                str(kl_a),
                results.percent(right),
                *(results.percent(Mean.read(share)) for share in shares),
            ]
        )
    real = Mean.read(content["rows"][0]["fidelity"]["real"])
    head = ["model", "likelihood", *(f"NLL, {shots}-shot" for shots in config.shots), "KL(z)", "KL(a)"]
    head += ["right class, %", f"{config.ways}-way 1-shot, %", "class fidelity, %"]
    about = (
        f"{config.split.capitalize()} classes, {config.images} images, seed {config.seed}; nats per image, mean ± "
        f"standard error. NLL: upper bound, one class in memory, {config.samples.many} importance samples for "
        f"{min(config.samples.corrected, config.images)} images and {config.samples.few} for all. KL(z), KL(a) "
        f"and the share of q(a|x) on entries of the right class: memories of 8 classes x 4 examples. Class "
        f"fidelity: images generated from one example, one each, of which the guide of {name_of(config.judge)} "
        f"finds the class among {config.ways} with another example each; of the real examples themselves "
        f"{results.percent(real)} %. NLLs of different likelihoods: what a memory is worth under each is the "
        "difference within a row."
    )
    name = f"{config.out.name}.png"
    parts: list[str | results.Picture] = [about, table(head, lines)]
    parts.append(results.Picture(name, "Draws of x by each model from the same entries", picture))
    results.write(config.out, content, "Likelihoods: NLL, latents in charge, class fidelity", parts)


if __name__ == "__main__":
    cli.run(main, LikelihoodsConfig, __doc__)
