"""What labels add to q(a | x): keys trained to find the class, beside those that the bound alone has made.

The generative objective has no labels: an entry is as good as the image it helps to explain. Here a `KeyNetwork`
is put beside all other weights, which stay as they are, and is trained on -log q(class of x | x, M) on background
alphabets, turned by quarters (as classes of their own) and a little bent, under memories of many classes. What is
kept has the best 20-way 1-shot accuracy on validation alphabets. Writes model.pt, results.json, report.md and a
picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import folder, kept, plots, protocols, results
from common.subject import TestConfig, load_subject
from paper import published
from vma_pyro import cli, models, pretrained
from vma_pyro._system.markdown import table
from vma_pyro.data import EpisodeSampler, ImageClasses, NestedEpisodes, split_of
from vma_pyro.evaluation import Mean
from vma_pyro.training.start import start_from

BENT = {"turn": 0.25, "scale": 0.15, "shear": 0.2, "shift": 0.12}  # radians, shares, shares, half sides; at most


@dataclass(frozen=True)
class KeysConfig(TestConfig):
    """Train keys to find the class, and compare."""

    out: Path = Path("runs/keys")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    key_maps: int = 64
    """Maps of the key network's first stage."""
    classes: int = 60
    """Classes of the training memories, with one example each; and targets."""
    minutes: float = 20.0
    """Of training; the learning rate falls to nothing by then."""
    learning_rate: float = 1e-3
    """Of Adam, at the start."""
    validate_every: int = 500
    """Updates between validations."""
    validation_images: int = 1000
    """Images of each validation."""
    images: int = 3000
    """Targets of each task."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        super().__post_init__()
        cli.check_sizes(self, "key_maps", "validate_every", "validation_images")
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: expected a finite number above 0, got {self.minutes}")

    def resolved(self) -> KeysConfig:
        """Fill in the tiny sizes, if they are wanted."""
        if not self.tiny:
            return self
        small: dict[str, Any] = {"key_maps": 2, "classes": 3, "minutes": 1e-6, "images": 4, "validation_images": 4}
        return replace(self, **small)


class Task(NamedTuple):
    """What is classified."""

    keys: str
    split: str
    among: str
    ways: int
    shots: int


def widened(load: Path, key_maps: int) -> models.Pair:
    """The same model and guide with a key network, which has no effect yet.

    Raises:
        ValueError: networks of another kind than ConvNetworks, or with a key network.
    """
    model, guide = models.load(load, program="memory")
    described = copy.deepcopy(models.describe(model, guide))
    number = described["parts"][described["pair"][0]]["arguments"]["networks"]["part"]
    arguments = described["parts"][number]["arguments"]
    if "conv" not in str(described["parts"][number]["class"]).lower() or arguments.get("key_maps"):
        raise ValueError(f"load: expected ConvNetworks without a key network, got {described['parts'][number]}")
    arguments["key_maps"] = key_maps
    pair = models.rebuild(described)
    start_from(load, pair)
    return pair


def bent(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same drawings a little turned, stretched, slanted and moved, each in its own way; binary still."""
    n = len(images)
    turn, sx, sy, slant, dx, dy = (2 * torch.rand(6, n, generator=generator) - 1).unbind()
    turn, slant = turn * BENT["turn"], slant * BENT["shear"]
    cos, sin = turn.cos(), turn.sin()
    sx, sy = 1 + sx * BENT["scale"], 1 + sy * BENT["scale"]
    rows = [cos * sx, (slant * cos - sin) * sy, dx * BENT["shift"], sin * sx, (slant * sin + cos) * sy]
    theta = torch.stack([*rows, dy * BENT["shift"]], -1).reshape(n, 2, 3).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False) > 0.5).to(images.dtype)


def train(pair: models.Pair, split: Any, config: KeysConfig, device: torch.device) -> dict[str, Any]:
    """Train the key network; leave the weights of the best validation in the pair, and say how it went."""
    networks: Any = pair[0].networks
    guide: Any = pair[1]
    free = [*networks.keys.parameters(), *guide.similarity.parameters()]
    shape: dict[str, Any] = {"classes": config.classes, "shots": 1, "queries": config.classes}
    turned = split.train.image_shape[1] == split.train.image_shape[2]
    episodes = EpisodeSampler(split.train, **shape, seed=config.seed, augment="rotations" if turned else None)
    optimizer = torch.optim.Adam(free, config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    best, kept_weights, curve = -1.0, copy.deepcopy(models.as_one(pair).state_dict()), []
    start, update, progress = time.monotonic(), 0, 0.0
    with tqdm(desc="keys", unit="update") as line:
        while progress < 1:
            e = episodes.sample().to(device)
            x, entries = bent(e.x, generator), bent(e.memory.entries, generator)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad()
            with torch.no_grad():  # the pyramid's share does not change
                tops = [networks.climb(images)[1] for images in (x, entries)]
            keys = [networks.key(images, top) for images, top in zip((x, entries), tops, strict=True)]
            loss = F.cross_entropy(guide.similarity(*keys), e.labels)  # entry c is the one of class c
            loss.backward()
            optimizer.step()
            update += 1
            line.update()
            progress = (time.monotonic() - start) / 60 / config.minutes
            if update % config.validate_every == 0 or progress >= 1:
                found = accuracy(pair, split.validation, (min(20, len(split.validation)), 1), config, device).mean
                curve.append({"update": update, "accuracy": found, "loss": loss.item()})
                line.set_postfix(validation=f"{100 * found:.1f} %", loss=f"{loss.item():.3f}")
                if found > best:
                    best, kept_weights = found, copy.deepcopy(models.as_one(pair).state_dict())
    models.as_one(pair).load_state_dict(kept_weights)
    seconds = round(time.monotonic() - start, 1)
    return {"updates": update, "training_seconds": seconds, "validation_accuracy": best, "curve": curve}


def accuracy(
    pair: models.Pair,
    of: ImageClasses,
    task: tuple[int, int],
    config: KeysConfig,
    device: torch.device,
) -> Mean:
    """By q(a | x), in validation."""
    nested = NestedEpisodes(of, images=config.validation_images, seed=1)
    return protocols.accuracy(pair, nested.episodes(*task), device=device)


def score(
    pairs: dict[str, models.Pair], classes: dict[str, ImageClasses], config: KeysConfig, device: Any, task: Task
) -> dict[str, Any]:
    """Share of targets classified right."""
    within = task.among == "one alphabet"
    nested = NestedEpisodes(
        classes[task.split],
        images=config.images,
        seed=config.seed,
        within_alphabet=within,
        smallest_alphabet=task.ways if within else 1,
    )
    episodes = nested.episodes(task.ways, task.shots)
    found = protocols.accuracy(pairs[task.keys], episodes, device=device)
    return {**task._asdict(), "accuracy": found._asdict()}


def main(config: KeysConfig) -> None:
    """Train the keys, score them beside those of the bound, and write."""
    start = time.monotonic()
    config = config.resolved()
    subject = load_subject(config)
    split = split_of(subject.facts, config.data_dir)
    torch.manual_seed(config.seed)
    pair = models.on(subject.device, widened(config.load, config.key_maps))
    folder.begin(config, load=config.load, files=[pretrained.file_of(config.load)])

    def trained() -> dict[str, Any]:
        facts = train(pair, split, config, subject.device)
        told = {name: value for name, value in subject.facts.items() if name != "loaded_from"}
        of_keys = {name: value for name, value in facts.items() if name != "curve"}
        models.save(config.out / "model.pt", pair, data=str(told.get("data")), training=told | {"keys": of_keys})
        return facts

    facts = kept.once(config, "training", trained)
    models.read_weights(pair, config.out / "model.pt")
    classes = {"validation": split.validation, "test": split.test}
    ways, shots = ((2, 3), (1,)) if config.tiny else ((5, 20), (1, 5))
    tasks = [
        Task(keys, where, among, w, s)
        for keys in ("bound alone", "with labels")
        for where in classes
        for among in ("all alphabets", "one alphabet")
        for w in ways
        for s in shots
        if w <= largest(classes[where], among)
    ]
    pairs = {"bound alone": subject.pair, "with labels": pair}
    with config.arithmetic(subject.device):
        rows = kept.each(config, tasks, partial(score, pairs, classes, config, subject.device), unit="task")
    head = results.header(config, since=start, device=subject.device, training={"model": subject.facts})
    write({**head, "keys": facts, "rows": rows}, config)


def largest(classes: ImageClasses, among: str) -> int:
    """How many classes there are to choose from."""
    if among == "all alphabets":
        return len(classes)
    return max(classes.groups.count(group) for group in set(classes.groups))


def write(content: dict[str, Any], config: KeysConfig) -> None:
    """Write results.json, report.md and the picture."""
    found = {tuple(r[name] for name in Task._fields): Mean.read(r["accuracy"]) for r in content["rows"]}
    columns = list(dict.fromkeys((ways, shots) for *_, ways, shots in found))
    lines = []
    for rest in dict.fromkeys(key[:3] for key in found):
        cells = [results.percent(found[*rest, *c]) if (*rest, *c) in found else "" for c in columns]
        lines.append([*rest, *cells])
    anchors = [published.STATISTICIAN_ACCURACY.get(column, "") for column in columns]
    lines.append(["Neural Statistician, recalled", "", "", *map(str, anchors)])
    facts = content["keys"]
    about = (
        f"Correct by q(a|x), %, mean ± standard error over {config.images} targets, one at a time, each with a "
        f"memory of its own that does not hold it; seed {config.seed}. Bound alone: the model as it is. With "
        f"labels: a key network of {config.key_maps} maps beside it, trained on {facts['updates']:,} memories of "
        f"{config.classes} classes in {facts['training_seconds'] / 60:.0f} minutes; all other weights are as they "
        "were."
    )
    head = ["keys", "alphabets", "among", *(f"{ways}-way {shots}-shot" for ways, shots in columns)]
    shares = [(p["update"], p["accuracy"]) for p in facts["curve"]]
    errors = [100 * math.sqrt(share * (1 - share) / config.validation_images) for _, share in shares]
    points = [(update, 100 * share, error) for (update, share), error in zip(shares, errors, strict=True)]
    curve = {"20-way 1-shot, validation": points}
    picture = results.Picture(
        f"{config.out.name}.png",
        "Accuracy in training",
        lambda path: plots.save_lines(path, curve, x="updates", y="correct, %"),
    )
    results.write(config.out, content, "What labels add to q(a|x)", [about, table(head, lines), picture])


if __name__ == "__main__":
    cli.run(main, KeysConfig, __doc__)
