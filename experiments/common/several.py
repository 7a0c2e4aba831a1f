"""Several models that are trained alike and compared: their common options, and how each is trained or loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from common import alike, folder
from common.protocols import TINY, Samples
from common.train import TrainOptions, as_many, loaded_facts, make_elbo, train_pair
from vma_pyro import cli, models
from vma_pyro.data import Episode, EpisodeSampler, NestedEpisodes, Split, load_split
from vma_pyro.data.episodes import Augmentation, Episodes
from vma_pyro.training import TrainConfig, device_of


@dataclass(frozen=True)
class SeveralConfig:
    """Options of every experiment that trains several models."""

    data: Literal["glyphs", "omniglot", "omniglot-45"] = "omniglot"
    """Procedural glyphs, Omniglot's canonical split, or 45 of its alphabets against 5."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    out: Path = Path("runs/several")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    load: Path | None = None
    """Folder of an earlier run, whose models are tested again, without training."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps per convolution."""
    latent_dim: int = 64
    """Dimension of z."""
    queries: int = 64
    """Images per update."""
    particles: int = 4
    """K of the multi-sample bound."""
    estimator: str = "vimco"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`."""
    augment: Literal["none", "rotations", "rotations+flips"] = "rotations"
    """Turned training images as classes of their own; the test classes are never turned."""
    train: TrainOptions = field(default_factory=TrainConfig)
    """Training of each model."""
    samples: Annotated[Samples, tyro.conf.OmitArgPrefixes] = field(default_factory=Samples)
    """Importance samples of the tests."""
    images: int = 2000
    """Test images, the same for all models and memories."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing, those of each experiment among them."""
        names = ("latent_dim", "queries", "particles", "images")
        more = ("classes", "shots", "test_shots", "train_classes", "train_shots", "draws", "entries")
        cli.check_sizes(self, *names, *(name for name in more if hasattr(self, name)))
        cli.check_factor(self, "width")


class Session(NamedTuple):
    """What every script that trains several models has at hand.

    Attributes:
        since: when it began, on the monotonic clock.
        device: to train and test on.
        data: to train and validate on, and to test with.
        nested: the test targets, the same for all models and memories.
    """

    since: float
    device: torch.device
    data: Split
    nested: NestedEpisodes

    def group(self, *, but_for: str = "") -> alike.Group:
        """A group of models that are compared; `but_for` is the fact in which they are meant to differ."""
        return alike.Group(next(self.nested.episodes(1, 1)).to(self.device), but_for=but_for)


def begin(config: SeveralConfig) -> Session:
    """Load the data, and make room for the results, or go on with them."""
    since, device = time.monotonic(), device_of(config.train)
    data = load_split(config.data, config.data_dir)
    nested = NestedEpisodes(data.test, images=config.images, seed=0)
    folder.begin(config, load=config.load)
    return Session(since, device, data, nested)


def small(config: SeveralConfig) -> dict[str, Any]:
    """The options that make any of these experiments tiny."""
    steps = replace(config.train, updates=2, minutes=None, log_every=1, validate_every=2, validation_samples=1)
    return {"width": 0.1, "latent_dim": 4, "queries": 4, "train": steps, "images": 4, "samples": TINY}


def train_or_load(
    config: SeveralConfig,
    name: str,
    data: Split,
    *,
    classes: int,
    shots: int,
    program: str = "memory",
    updates: int | None = None,
) -> tuple[models.Pair, dict[str, Any]]:
    """Train one of the models, go on with it, or load it; it is left in `models/NAME` of the run's folder.

    Args:
        config: what all of them share.
        name: of this one.
        data: to train and validate on.
        classes, shots: of the training memory.
        program: see `models.build`.
        updates: exactly so many, as another model has made that this one is compared with; by default the budget.

    Returns:
        Model and guide, and facts about the training.

    Raises:
        Stopped: the run was told to stop, and has left a checkpoint.
        ValueError, OSError, FloatingPointError: see `training.fit`.
    """
    if config.load is not None:
        path = config.load / "models" / name / "model.pt"
        return models.load(path, program=program), loaded_facts(path)
    architecture = {"networks": "conv", "width": config.width, "latent_dim": config.latent_dim, "program": program}
    torch.manual_seed(config.train.seed)
    pair = models.build(architecture)
    facts = train_one(
        config if updates is None else replace(config, train=as_many(config.train, updates)),
        name,
        pair,
        training_episodes(config, data, classes=classes, shots=shots),
        validation=validation_episodes(config, data, classes=classes, shots=shots),
        identity={"augment": config.augment, "classes": classes, "shots": shots} | architecture,
    )
    return pair, facts


def train_one(
    config: SeveralConfig,
    name: str,
    pair: models.Pair,
    episodes: Episodes,
    *,
    validation: Sequence[Episode],
    identity: dict[str, Any],
    data: str | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Train one of the models in `models/NAME` of the run's folder, or give it the weights that it has in another.

    Args:
        config: what all of them share.
        name: of this one.
        pair: model and guide.
        episodes, validation, identity: see `train_pair`.
        data: name of the data set; default: the experiment's.
        label: in front of the progress line; default: the name.

    Returns:
        Facts about the training.
    """
    if config.load is not None:
        path = config.load / "models" / name / "checkpoint.pt"
        models.read_weights(pair, path)
        return loaded_facts(path)
    shared = {n: getattr(config, n) for n in ("queries", "particles", "estimator")}
    return train_pair(
        pair,
        make_elbo(config.estimator, config.particles),
        episodes,
        config=config.train,
        folder=config.out / "models" / name,
        data=data or config.data,
        validation=validation,
        identity=shared | identity,
        resume=config.resume,
        label=label or name,
    )


def training_episodes(config: SeveralConfig, data: Split, *, classes: int, shots: int) -> EpisodeSampler:
    """Episodes of the training classes, turned if the configuration says so."""
    augment: Augmentation | None = None if config.augment == "none" else config.augment
    shape: dict[str, Any] = {"classes": classes, "shots": shots, "queries": config.queries}
    return EpisodeSampler(data.train, **shape, seed=config.train.seed, augment=augment)


def validation_episodes(config: SeveralConfig, data: Split, *, classes: int, shots: int) -> list[Episode]:
    """A few episodes of held-out classes."""
    held_out = EpisodeSampler(data.validation, classes=classes, shots=shots, queries=config.queries, seed=1)
    return [held_out.sample() for _ in range(4)]
