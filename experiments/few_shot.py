"""The main job: train on few-shot episodes, take the bound apart, generate from one example.

Trains a memory model and a memoryless one on the same networks, scores both on unseen classes, and writes
report.md, results.json and pictures. Without options it takes a few minutes on two CPU cores, on procedural
glyphs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from pyro.infer.elbo import ELBO

from vma_pyro.atomic import write_text
from vma_pyro.data import EpisodeSampler, Split, load_split
from vma_pyro.data.episodes import Augmentation
from vma_pyro.infer import make
from vma_pyro.jobs import few_shot, plots, report, script, trained
from vma_pyro.ranks import Ranks
from vma_pyro.record import command, read_metrics, tensorboard_writer
from vma_pyro.training import TrainConfig, check_shares, device_of


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot generation with a variational memory."""

    data: Literal["glyphs", "omniglot", "omniglot-45"] | None = None
    """Procedural glyphs, made on the spot, or Omniglot: the canonical split, or 45 alphabets against 5 (as figures
    3 to 5 of the paper). Default: what the loaded checkpoint was trained on, else glyphs."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder, where
    Omniglot is downloaded to."""
    out: Path = Path("runs/few_shot")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    load: Path | None = None
    """Report and generate from this checkpoint, or the one that the word pretrained stands for, without
    training."""
    init: Path | None = None
    """Train on from the weights of this checkpoint, or of the one that the word pretrained stands for: a new cycle
    of the learning rate, a new optimizer."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    width: float | None = None
    """Factor on the paper's 48 and 64 maps per convolution; default 0.25 for glyphs, 0.33 for Omniglot."""
    latent_dim: int = 64
    """Dimension of z."""
    refinement: int | None = None
    """Maps of a second look of q(z | x, m) at x, m and what the first guess decodes to; 0 for none. Default: what
    the checkpoint to start from has, else 0."""
    train_only: Literal["all", "refinement"] = "all"
    """Train everything, or only what `refinement` adds."""
    classes: int | None = None
    """Classes in the training memory; default 16 for glyphs, 12 for Omniglot. The paper has 8 classes x 4
    examples; on held-out alphabets more examples of fewer classes serve many shots, fewer of more classes one."""
    shots: int | None = None
    """Examples of each class in the training memory; default 2 for glyphs, 3 for Omniglot."""
    queries: int = 32
    """Images per update."""
    particles: int = 4
    """K of the multi-sample bound."""
    estimator: str = "vimco"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`: vimco, vimco+dreg, loo, rloo, distinct, ..."""
    augment: Literal["none", "rotations", "rotations+flips"] = "rotations"
    """Turned training images as classes of their own; the test classes are never turned."""
    shared_memory: bool = True
    """One memory for all images of an update (fast), or one for each, as in the paper."""
    memoryless: bool = True
    """Also train the memoryless model, for as many updates, to know what the memory brings."""
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainConfig)
    """Training. Without a budget: 2.2 minutes for glyphs, 60 for Omniglot, for each of the two models."""
    eval_images: int | None = None
    """Test images per likelihood; default 2000 for glyphs, 500 for Omniglot, 200 for the pretrained model."""
    eval_samples: int | None = None
    """Importance samples per test image; default 20 for glyphs, 1000 for Omniglot, 50 for the pretrained model."""
    eval_queries: int | None = None
    """Test images per classification task; default 1000, 500 for the pretrained model."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `track`)."""
    tiny: bool = False
    """Everything once, as small as it gets, to see that it runs."""

    def small(self) -> FewShotConfig:
        """The same job, tiny."""
        steps = replace(self.train, updates=2, minutes=None, log_every=1, validate_every=2, validation_samples=1)
        sizes: dict[str, Any] = {"width": 0.1, "latent_dim": 4, "classes": 3, "shots": 2, "queries": 4}
        tests: dict[str, Any] = {"eval_images": 4, "eval_samples": 2, "eval_queries": 10}
        return replace(self, **sizes, **tests, train=steps, tiny=False)

    def resolved(self) -> FewShotConfig:
        """The same configuration with the defaults of its data, or of the loaded checkpoint, filled in."""
        if self.tiny:
            return self.small().resolved()
        source = self.load or self.init
        loaded = {} if source is None else trained.facts_of(source)
        data = self.data or loaded.get("data", "glyphs")
        if data not in PRESETS:
            raise ValueError(f"load: expected a model of {', '.join(PRESETS)}, got one of {data}")
        preset = PRESETS[data]
        if self.load == trained.PRETRAINED:  # a look at it, in less than a minute
            preset = preset._replace(eval_images=200, eval_samples=50, eval_queries=500)
        unlimited = self.train.updates is None and self.train.minutes is None
        return replace(
            self,
            data=data,
            width=loaded.get("width", preset.width if self.width is None else self.width),
            latent_dim=loaded.get("latent_dim", self.latent_dim),
            refinement=loaded.get("refinement", 0) if self.refinement is None else self.refinement,
            classes=preset.classes if self.classes is None else self.classes,
            shots=preset.shots if self.shots is None else self.shots,
            eval_images=preset.eval_images if self.eval_images is None else self.eval_images,
            eval_samples=preset.eval_samples if self.eval_samples is None else self.eval_samples,
            eval_queries=preset.eval_queries if self.eval_queries is None else self.eval_queries,
            train=replace(self.train, minutes=preset.minutes) if unlimited else self.train,
        )

    def protocol(self) -> few_shot.Protocol:
        """How much to measure."""
        assert self.eval_images is not None  # resolved
        assert self.eval_samples is not None
        assert self.eval_queries is not None
        return few_shot.Protocol(images=self.eval_images, samples=self.eval_samples, queries=self.eval_queries)


class Preset(NamedTuple):
    """Sizes that suit the data on two CPU cores."""

    width: float
    classes: int
    shots: int
    minutes: float
    eval_images: int
    eval_samples: int
    eval_queries: int = 1000


PRESETS = {
    "glyphs": Preset(0.25, 16, 2, 2.2, 2000, 20),
    "omniglot": Preset(0.33, 12, 3, 60.0, 500, 1000),
    "omniglot-45": Preset(0.33, 12, 3, 60.0, 500, 1000),
}


# What the sessions of one run must share, beside the data, the architecture and how it is trained.
IDENTITY = ("classes", "shots", "queries", "particles", "estimator", "augment", "shared_memory")


def objective(config: FewShotConfig, *, memory: bool = True) -> ELBO:
    """What is trained. Without a memory, an estimator that chooses addresses gives way to the plain bound."""
    elbo = make(config.estimator, config.particles)
    return elbo if memory or not hasattr(elbo, "site") else make("vimco", config.particles)


def samplers(config: FewShotConfig, data: Split) -> tuple[EpisodeSampler, EpisodeSampler]:
    """Episodes to train on, and of held-out classes."""
    augment: Augmentation | None = None if config.augment == "none" else config.augment
    shape: dict[str, Any] = {"classes": config.classes, "shots": config.shots, "queries": config.queries}
    episodes = EpisodeSampler(
        data.train, **shape, seed=config.train.seed, shared_memory=config.shared_memory, augment=augment
    )
    held_out = EpisodeSampler(data.validation, **shape, seed=1)
    return episodes, held_out


def architecture_of(config: FewShotConfig, *, memory: bool) -> dict[str, Any]:
    """What the networks and programs can be rebuilt from."""
    program = "memory" if memory else "memoryless"
    sizes = {"width": config.width, "latent_dim": config.latent_dim}
    refined = {"refinement": config.refinement} if config.refinement else {}
    return {"networks": "conv", **sizes, **refined, "program": program}


def train(
    config: FewShotConfig, data: Split, folder: Path, *, memory: bool, updates: int | None = None
) -> tuple[trained.Pair, dict[str, Any]]:
    """Train one of the two models, or go on with it."""
    episodes, held_out = samplers(config, data)
    only = {} if config.train_only == "all" or not memory else {"train_only": config.train_only}
    return trained.train(
        architecture_of(config, memory=memory),
        objective(config, memory=memory),
        episodes,
        config=config.train if updates is None else replace(config.train, updates=updates),
        folder=folder,
        data=str(config.data),
        validation=[held_out.sample() for _ in range(8)],
        identity={name: getattr(config, name) for name in IDENTITY} | only,
        init=config.init if memory else None,
        only=only.get("train_only"),
        resume=config.resume,
        tensorboard=config.tensorboard,
        label="memory model" if memory else "memoryless model",
    )


def main(config: FewShotConfig) -> None:
    """Train (or load), evaluate, write; under `torchrun` all processes train, and the first does the rest."""
    start = time.monotonic()
    config = config.resolved()
    ranks = Ranks.start()
    data = ranks.in_turn(lambda: load_split(str(config.data), config.data_dir))  # the first one downloads
    rehearse(config, data)
    if ranks.rank == 0:
        script.make_room(config.out, resume=config.resume, load=config.load)
    ranks.wait()
    device = device_of(config.train)
    protocol = config.protocol()
    training: dict[str, Any] = {}
    if config.load is None:
        (model, guide), training["memory"] = train(config, data, config.out, memory=True)
    else:
        model, guide = trained.load(config.load, program="memory")
    if ranks.rank > 0:
        if config.load is None:
            memoryless_pair(config, data, training)
        return
    model, guide = model.to(device), guide.to(device)
    print("scoring the memory model on unseen classes ...")
    few_shot.draw_pictures(model, guide, data.test, protocol, config.out, device=device)
    scores = few_shot.score(model, guide, data.test, protocol, device=device)
    # The memory model's report is on disk before the memoryless one starts.
    write(config, scores, None, training, time.monotonic() - start)

    memoryless = memoryless_pair(config, data, training)
    if memoryless is not None:
        memoryless = tuple(module.to(device) for module in memoryless)
        print("scoring the memoryless model on unseen classes ...")
        nll = few_shot.memoryless_nll(memoryless, data.test, protocol, device=device)
        scores = few_shot.information_gained(scores, memoryless, data.test, protocol, device=device)
        write(config, scores, nll, training, time.monotonic() - start)
    print((config.out / "report.md").read_text())


def memoryless_pair(config: FewShotConfig, data: Split, training: dict[str, Any]) -> Any:
    """The memoryless model: trained as long as the memory model, or found beside a loaded one."""
    if not config.memoryless:
        return None
    if config.load is not None:
        path = beside(config.load)
        return trained.load(path, program="memoryless") if path.exists() else None
    pair, training["memoryless"] = train(
        config, data, config.out / "memoryless", memory=False, updates=training["memory"]["updates"]
    )
    return pair


def beside(path: Path) -> Path:
    """Where the memoryless model's checkpoint is, if it was trained with this one."""
    return path.parent / "memoryless" / path.name


def rehearse(config: FewShotConfig, data: Split) -> None:
    """Try every option at once: a bad one must not cost a training run, nor move an earlier one aside."""
    few_shot.check(config.protocol())
    objective(config)
    device_of(config.train)
    check_shares(config.queries, Ranks.present())
    if config.tensorboard:
        tensorboard_writer()
    if config.load is not None:
        if config.resume:
            raise ValueError(f"resume: expected no load beside it, as nothing is trained, got {config.load}")
        trained.load(config.load, program="memory")
        memoryless_pair(config, data, {})
    else:
        trained.build(architecture_of(config, memory=True))
        samplers(config, data)


def write(
    config: FewShotConfig,
    scores: few_shot.FewShotScores,
    memoryless: torch.Tensor | None,
    training: dict[str, Any],
    seconds: float,
) -> None:
    """results.json, report.md and training.png."""
    job = report.Job(
        command=command(),
        data=str(config.data),
        seconds=round(seconds, 1),
        device=device_of(config.train),
        seed=config.train.seed,
        training=training,
        config=asdict(config) | ({} if config.load is None else {"train": None}),
        protocol=config.protocol(),
    )
    for name, render in (("results.json", report.to_json), ("report.md", report.to_markdown)):
        write_text(config.out / name, render(job, scores, memoryless))
    runs = {
        label: read_metrics(folder / "metrics.jsonl")
        for label, folder in (("memory", config.out), ("memoryless", config.out / "memoryless"))
        if (folder / "metrics.jsonl").exists()
    }
    if runs:
        assert config.classes is not None  # resolved
        assert config.shots is not None
        entries = config.classes * config.shots
        plots.save_training(config.out / "training.png", runs, log_memory=math.log(entries))


def cli(arguments: Sequence[str] | None = None) -> None:
    """Run with command-line arguments; bad input ends in one line, not in a traceback."""
    script.run(main, FewShotConfig, __doc__, arguments)


if __name__ == "__main__":
    cli()
