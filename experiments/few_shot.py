"""The main job: train on few-shot episodes, take the bound apart, generate from one example.

Trains a memory model and a memoryless one on the same networks, scores both on unseen classes, and writes
report.md, results.json and pictures. Without options it takes a few minutes on two CPU cores, on procedural
glyphs.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from pyro.infer.elbo import ELBO

from common import alike, few_shot, folder, plots, rehearsal
from common.train import as_many, freeze_all_but, train_pair
from paper import report
from vma_pyro import cli, models
from vma_pyro._system.atomic import write_text
from vma_pyro._system.ranks import Ranks
from vma_pyro._system.record import command, read_metrics, tensorboard_writer
from vma_pyro.data import EpisodeSampler, Split, load_split
from vma_pyro.data.episodes import Augmentation
from vma_pyro.infer import make
from vma_pyro.training import TrainConfig, check_shares, device_of
from vma_pyro.training.start import start_from


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
        loaded = {} if source is None else models.facts_of(source)
        data = self.data or loaded.get("data", "glyphs")
        if data not in PRESETS:
            option = "load" if self.load else "init"
            raise ValueError(f"{option}: expected a model of {', '.join(PRESETS)}, got one of {data}")
        preset = PRESETS[data]
        if self.load == models.PRETRAINED:  # a look at it, in less than a minute
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
    elbo = objective_of(config, config.particles)
    return elbo if memory or not hasattr(elbo, "site") else make("vimco", config.particles)


def objective_of(config: FewShotConfig, particles: int) -> ELBO:
    """The estimator with so many particles."""
    with cli.option("estimator", instead_of="name"), cli.option("particles", instead_of="num_particles"):
        return make(config.estimator, particles)


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
) -> tuple[models.Pair, dict[str, Any]]:
    """Train one of the two models, or go on with it; without memory for as many updates as the other one."""
    episodes, held_out = samplers(config, data)
    only = {} if config.train_only == "all" or not memory else {"train_only": config.train_only}
    architecture = architecture_of(config, memory=memory)
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
        architecture=architecture,
        validation=[held_out.sample() for _ in range(8)],
        identity={name: getattr(config, name) for name in IDENTITY} | only,
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
    data = ranks.in_turn(lambda: load_split(str(config.data), config.data_dir))  # the first one downloads
    rehearse(config, data)
    if ranks.rank == 0:
        folder.make_room(config.out, resume=config.resume, load=config.load)
    ranks.wait()
    device = device_of(config.train)
    training: dict[str, Any] = {}
    if config.load is None:
        pair, training["memory"] = train(config, data, config.out, memory=True)
    else:
        pair = models.load(config.load, program="memory")
    if ranks.rank > 0:
        if config.load is None:
            memoryless_pair(config, data, training)
        return
    print("scoring the memory model on unseen classes ...")
    job = Job(config, data, models.on(device, pair), device, start, training)
    job.score()
    # The memory model's report is on disk before its pictures are drawn, and before the memoryless one starts.
    job.write()
    job.draw()
    memoryless = memoryless_pair(config, data, training)
    if memoryless is not None:
        print("scoring the memoryless model on unseen classes ...")
        job.compare(models.on(device, memoryless))
        job.write()
    print((config.out / "report.md").read_text())


class Job:
    """What is measured of a trained memory model, and its report.

    Args:
        config: all options.
        data: whose test classes are unseen.
        pair: model and guide, on the device.
        device: to measure on.
        start: of the job, on the monotonic clock.
        training: facts about each model that was trained here.
    """

    def __init__(
        self,
        config: FewShotConfig,
        data: Split,
        pair: models.Pair,
        device: torch.device,
        start: float,
        training: dict[str, Any],
    ) -> None:
        self.config, self.data, self.pair, self.device = config, data, pair, device
        self.start, self.training = start, training
        self.protocol = config.protocol()
        self.memoryless: torch.Tensor | None = None  # NLL of each image without memory
        self.no_gain = ""
        self.pictures: dict[str, str] = {}  # name to why it is not drawn; empty if it is

    def score(self) -> None:
        """The memory model."""
        self.scores = few_shot.score(*self.pair, self.data.test, self.protocol, device=self.device)

    def compare(self, memoryless: models.Pair) -> None:
        """The memoryless model; what the memory gains over it, where both were trained alike."""
        test, protocol, device = self.data.test, self.protocol, self.device
        self.memoryless = few_shot.memoryless_nll(memoryless, test, protocol, device=device)
        example = few_shot.shared_episode(test, protocol).to(device)
        self.no_gain = alike.difference((self.pair, memoryless), self.facts(), example) or ""
        if self.no_gain:
            print(f"note: no gain over no memory is reported; {self.no_gain}")
        else:
            self.scores = few_shot.information_gained(self.scores, memoryless, test, protocol, device=device)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """About the training of both models, here or elsewhere."""
        if self.config.load is not None:
            return models.facts_of(self.config.load), models.facts_of(beside(self.config.load))
        return self.training["memory"], self.training["memoryless"]

    def draw(self) -> None:
        """The pictures of what the model does, and the pages with them."""
        options: Any = (*self.pair, self.data.test, self.protocol)
        for name, draw in few_shot.PICTURES.items():
            job = partial(draw, *options, device=self.device)
            self.pictures[name] = plots.drawn(self.config.out / name, job)
        self.write_pages()

    def write(self) -> None:
        """results.json and report.md, then training.png."""
        self.write_pages()
        runs = {
            label: read_metrics(folder / "metrics.jsonl")
            for label, folder in (("memory", self.config.out), ("memoryless", self.config.out / "memoryless"))
            if (folder / "metrics.jsonl").exists()
        }
        if runs:
            assert self.config.classes is not None  # resolved
            assert self.config.shots is not None
            most = math.log(self.config.classes * self.config.shots)
            path = self.config.out / "training.png"
            draw = partial(plots.save_training, runs=runs, log_memory=most)
            self.pictures["training.png"] = plots.drawn(path, draw)
        self.write_pages()

    def write_pages(self) -> None:
        """results.json and report.md, with the pictures that there are by now."""
        facts = report.Job(
            command=command(),
            data=str(self.config.data),
            seconds=round(time.monotonic() - self.start, 1),
            device=self.device,
            seed=self.config.train.seed,
            training=self.training,
            config=asdict(self.config) | ({} if self.config.load is None else {"train": None}),
            protocol=self.protocol,
            no_gain=self.no_gain,
            pictures=self.pictures,
        )
        for name, render in (("results.json", report.to_json), ("report.md", report.to_markdown)):
            write_text(self.config.out / name, render(facts, self.scores, self.memoryless))


def memoryless_pair(config: FewShotConfig, data: Split, training: dict[str, Any]) -> Any:
    """The memoryless model: trained for as many updates as the memory model, or found beside a loaded one."""
    if not config.memoryless:
        return None
    if config.load is not None:
        path = beside(config.load)
        return models.load(path, program="memoryless") if path.exists() else None
    pair, training["memoryless"] = train(
        config, data, config.out / "memoryless", memory=False, updates=training["memory"]["updates"]
    )
    return pair


def beside(path: Path) -> Path:
    """Where the memoryless model's checkpoint is, if it was trained with this one."""
    return path.parent / "memoryless" / path.name


def rehearse(config: FewShotConfig, data: Split) -> None:
    """Try everything at once: a mistake must not cost a training run, nor move an earlier one aside."""
    check(config)
    rehearsal.check_images_fit(config.protocol())
    objective(config)
    device = device_of(config.train)
    check_shares(config.queries, Ranks.present())
    if config.tensorboard:
        tensorboard_writer()
    if config.load is not None:
        if config.resume:
            raise ValueError(f"resume: expected no load beside it, as nothing is trained, got {config.load}")
        if config.init is not None:
            raise ValueError(f"init: expected no load beside it, as nothing is trained, got {config.init}")
        pair = models.load(config.load, program="memory")
        memoryless = memoryless_pair(config, data, {})
    else:
        rehearsal.check_weights_fit(architecture_of(config, memory=True), device)
        with torch.random.fork_rng(devices=[]):
            pair, memoryless = (models.build(architecture_of(config, memory=memory)) for memory in (True, False))
        if config.init is not None:
            start_from(config.init, models.as_one(pair))
        if config.train_only != "all":
            freeze_all_but(pair, config.train_only)
        samplers(config, data)
        few = samplers(replace(config, queries=min(4, config.queries)), data)[0].sample()
        elbo, sizes = partial(objective_of, config), {"particles": config.particles, "queries": config.queries}
        with rehearsal.on_two_images():
            rehearsal.check_update_fits(models.on(device, pair), elbo, few, **sizes, device=device)
    with tempfile.TemporaryDirectory() as folder, rehearsal.on_two_images():
        two = replace(config, eval_images=2, eval_samples=2, eval_queries=2, out=Path(folder))
        job = Job(two, data, models.on(device, pair), device, time.monotonic(), {})
        job.score()
        rehearsal.check_scores(job.pair, job.scores, data.test, job.protocol, device)
        job.draw()
        if config.memoryless and memoryless is not None:
            few_shot.memoryless_nll(models.on(device, memoryless), data.test, job.protocol, device=device)


def check(config: FewShotConfig) -> None:
    """Refuse sizes that mean nothing, by the names of their options."""
    sizes = (
        "latent_dim",
        "classes",
        "shots",
        "queries",
        "particles",
        "eval_images",
        "eval_samples",
        "eval_queries",
    )
    cli.check_sizes(config, *sizes)
    cli.check_sizes(config, "refinement", least=0)
    cli.check_factor(config, "width")


if __name__ == "__main__":
    cli.run(main, FewShotConfig, __doc__)
