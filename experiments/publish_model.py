"""Put a trained model into the package, with its card: what `load_pretrained` and `--load pretrained` find.

The weights (the averaged ones, as all evaluations use them, rounded to 16 bits or 8) go to `NAME.pt`, and how they
were made and how good they are, rounded, to `NAME.json`, with what the rounding changes. A model that is there
already gives way only to one with a lower one-shot NLL on the validation alphabets, or with a judge to one whose
samples are more often of their class there, or as often, within a standard error, at a lower NLL: the test
alphabets have no say.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from common import protocols, results
from common.protocols import TASKS, TINY, Samples
from vma_pyro import cli, models, pretrained
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro._system.command import command
from vma_pyro.data import ImageClasses, NestedEpisodes, Split, split_of
from vma_pyro.evaluation import Mean, guide_gap
from vma_pyro.training import device_of_name

MOST_BYTES = 6_000_000
FIDELITY = (
    " Fidelity: share of images generated from one example each of which the guide of {judge} finds the class "
    "among 20 (or all), and of the real examples themselves; on as many validation images, too."
)


@dataclass(frozen=True)
class PublishConfig:
    """Publish a trained model with its card."""

    load: Path
    """Checkpoint of the model: `model.pt` of a finished run."""
    name: str = "omniglot"
    """Name of the model in the package."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    bits: Literal[16, 8] = 16
    """Of each weight in the file: what they change is on the card."""
    out: Path = pretrained.FOLDER
    """Folder of published models."""
    judge: Path | None = None
    """Choose by class fidelity, not by NLL: the share of images generated from one example of which the guide of
    this checkpoint (or of the word pretrained) finds the class among 20. A sharp likelihood can have a low NLL and
    draw strokes of no class."""
    shots: tuple[int, ...] = (1, 2, 5, 19)
    """Examples of one class at which the NLL is measured."""
    images: int = 5000
    """Test images."""
    gap_images: int = 64
    """Validation images by which the guide's part of the ELBO is measured."""
    gap_steps: int = 100
    """Steps by which q(z | x, m) of each of these is optimised for that."""
    samples: Annotated[Samples, tyro.conf.OmitArgPrefixes] = field(default_factory=Samples)
    """Importance samples."""
    accelerator: str = "auto"
    """Where to run: cpu, cuda, mps (an Apple GPU), or auto, the first of cuda, mps and cpu that there is."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        cli.check_sizes(self, "shots", "images", "gap_images", "gap_steps")

    def resolved(self) -> PublishConfig:
        """Fill in the tiny sizes, if they are wanted."""
        if not self.tiny:
            return self
        return replace(self, shots=(1,), images=5, gap_images=2, gap_steps=1, samples=TINY)


def nll(pair: models.Pair, of: ImageClasses, shots: int, config: PublishConfig, device: torch.device) -> Any:
    """NLL with one class in memory, nats per image."""
    nested = NestedEpisodes(of, images=config.images, seed=0)
    targets = partial(nested.episodes, 1, shots)
    return protocols.nll(pair, targets, config.samples, device=device).estimate()._asdict()


def accuracy(
    pair: models.Pair, of: ImageClasses, task: tuple[int, int], config: PublishConfig, device: torch.device
) -> Any:
    """Accuracy by q(a | x), among all test classes."""
    nested = NestedEpisodes(of, images=config.images, seed=0)
    return protocols.accuracy(pair, nested.episodes(*task), device=device)._asdict()


def fidelity(pair: models.Pair, of: ImageClasses, config: PublishConfig, device: torch.device) -> Any:
    """Class fidelity among 20 classes, or all that there are."""
    assert config.judge is not None
    judge = models.load(config.judge, program="memory")[1].to(device)
    nested = NestedEpisodes(of, images=config.images, seed=0)
    return protocols.fidelity(pair, judge, nested.episodes(min(20, len(of)), 1), seed=0, device=device)


def rounding(
    exact: models.Pair, pair: models.Pair, of: ImageClasses, config: PublishConfig, device: torch.device
) -> Any:
    """What rounding the weights does to the NLL with one class in memory, nats per image."""
    nested = NestedEpisodes(of, images=config.images, seed=0)
    nlls = [
        protocols.nll_of_each(each, nested.episodes(1, 1), config.samples.few, device=device)
        for each in (pair, exact)
    ]
    return Mean.of(nlls[0] - nlls[1])._asdict()


def gap(pair: models.Pair, of: ImageClasses, config: PublishConfig, device: torch.device) -> Any:
    """The guide's part of the ELBO, and of the bound of 50 samples, one entry in memory, nats per image."""
    nested = NestedEpisodes(of, images=config.gap_images, seed=0)
    parts = []
    for episode in nested.episodes(1, 1):
        e = episode.to(device)
        parts.append(guide_gap(*pair, e.memory, e.x, steps=config.gap_steps, num_samples=50))
    names = ("elbo", "refined_elbo", "gap", "bound", "refined_bound", "bound_gap")
    return {name: Mean.pooled([getattr(part, name) for part in parts])._asdict() for name in names}


def check_better(
    pair: models.Pair, validation: Any, config: PublishConfig, data: Split, device: torch.device
) -> None:
    """Refuse a model that is not better than the one that is there, on the validation classes."""
    there = config.out / f"{config.name}.json"
    if not there.exists():
        return
    found, present = validation["nll"]["mean"], json.loads(there.read_text())["validation_nll"]["mean"]
    if config.judge is None:
        if found >= present:
            raise ValueError(
                f"load: expected a lower validation NLL than {present:.2f} of the published model, got {found:.2f}"
            )
        return
    other = models.on(device, models.load(config.out / f"{config.name}.pt", program="memory"))
    published = fidelity(other, data.validation, config, device)["generated"]
    share = validation["fidelity"]["generated"]["mean"]
    if share <= published["mean"] and not (found < present and share > published["mean"] - published["se"]):
        raise ValueError(
            f"load: expected a higher class fidelity than {100 * published['mean']:.1f} ± "
            f"{100 * published['se']:.1f} % of the published model (or one within the error and a lower "
            f"validation NLL than {present:.2f}), got {100 * share:.1f} % and {found:.2f}"
        )


def main(config: PublishConfig) -> None:
    """Compare with the published model, measure, and write."""
    config = config.resolved()
    lock.take(config.out / config.name, argument="out")  # from the comparison until both files are written
    facts = models.facts_of(config.load)
    device = device_of_name(config.accelerator)
    exact = models.on(device, models.load(config.load, program="memory"))
    pair = models.rounded(exact, config.bits)
    data = split_of(facts, config.data_dir)
    validation = {"nll": nll(pair, data.validation, 1, config, device)}
    if config.judge is not None:
        validation["fidelity"] = fidelity(pair, data.validation, config, device)
    check_better(pair, validation, config, data, device)
    changed = rounding(exact, pair, data.validation, config, device)
    card = config.out / f"{config.name}.json"
    content = {
        "name": config.name,
        "training": facts,
        **{f"validation_{name}": value for name, value in validation.items()},
        "rounding": changed,
        "validation_guide_gap": gap(pair, data.validation, config, device),
        "nll": {str(shots): nll(pair, data.test, shots, config, device) for shots in config.shots},
        "accuracy": {
            f"{ways}-way {shots}-shot": accuracy(pair, data.test, (ways, shots), config, device)
            for ways, shots in TASKS
            if ways <= len(data.test)
        },
        **({} if config.judge is None else {"fidelity": fidelity(pair, data.test, config, device)}),
        "about": f"NLL: one class in memory, upper bound in nats per image from {config.samples.many} importance "
        f"samples; accuracy: by q(a | x) among all test classes; {config.images} test images, seed 0. Rounding: "
        f"NLL of the weights in {config.bits} bits less that in 32, {config.samples.few} samples, paired by "
        f"validation image. Guide gap: what q(z | x, m) optimised by {config.gap_steps} steps for each of "
        f"{config.gap_images} validation images wins of the ELBO, and of 50 samples, with one entry."
        + ("" if config.judge is None else FIDELITY.format(judge=config.judge)),
        "command": command(),
        "versions": results.versions(device),
    }
    publish(config.out / f"{config.name}.pt", pair, str(facts.get("data")), facts, bits=config.bits)
    write_text(card, results.to_json(content))
    print(results.to_json(content))


def publish(path: Path, pair: models.Pair, data: str, facts: dict[str, Any], *, bits: int) -> None:
    """Write the weights.

    Raises:
        ValueError: they are too large to come with the package.
    """
    size = sum(p.numel() * bits // 8 for p in models.as_one(pair).parameters())
    if size > MOST_BYTES:
        raise ValueError(f"load: expected at most {MOST_BYTES} bytes of weights, got {size} of {bits} bits each")
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save(path, models.on(torch.device("cpu"), pair), bits=bits, data=data, training=facts)


if __name__ == "__main__":
    cli.run(main, PublishConfig, __doc__)
