"""Which gradient estimator for a memory model: gradient quality, training curves, and a page that says which.

(a) Gradients on a small mixture whose discrete site can be summed, on procedural glyphs, and on the data, at the
start, in the middle and at the end of training, for several numbers of particles and memory sizes. (b) Every
estimator trains the same model from the same initial weights with the same number of decoder evaluations; then
VIMCO for longer, and the best of the others in half of its time. (c) The page `estimators.md`. Interrupted, it
goes on with --resume. Without options it takes minutes, on procedural glyphs.
"""

from __future__ import annotations

import json
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import tyro
from torch import nn

from vma_pyro import ConvNetworks, Guide, Model, laboratory, plots
from vma_pyro.atomic import write_text
from vma_pyro.data import Characters, EpisodeSampler, glyphs, omniglot
from vma_pyro.evaluation import Estimate
from vma_pyro.infer import make
from vma_pyro.infer.compare import evaluations_of
from vma_pyro.laboratory import Quality, Training
from vma_pyro.laboratory_page import Findings, snr_of, to_markdown
from vma_pyro.record import read_metrics
from vma_pyro.training import TrainConfig, fit, keep_freed_memory


class Candidate(NamedTuple):
    """Who trains: an estimator, K, images per update, learning rate."""

    estimator: str
    num_particles: int = 4
    queries: int = 32
    learning_rate: float = 2.1e-3

    @property
    def folder(self) -> str:
        """Of its training run."""
        return "-".join(map(str, self))


# All train the same model. K times images is 128 for all that draw, but for those whose particles cost less than a
# run of the model, and for one VIMCO that has their K and images. VIMCO gets further learning rates.
TRAINED = (
    Candidate("vimco"),
    Candidate("vimco", 4, 32, 1.5e-3),
    Candidate("vimco", 4, 32, 3e-3),
    Candidate("vimco", 2, 64),
    Candidate("vimco", 4, 64),
    Candidate("vimco+dreg"),
    Candidate("vimco+dreg", 2, 64),
    Candidate("vimco+resampled", 4, 64),
    Candidate("vimco+dreg+resampled", 4, 64),
    Candidate("vimco+dreg+resampled", 4, 64, 3e-3),
    Candidate("vimco+stl"),
    Candidate("loo"),
    Candidate("loo+dreg"),
    Candidate("ovis"),
    Candidate("rloo"),
    Candidate("vimco+common"),
    Candidate("distinct+wake"),
    Candidate("unordered-set"),
    Candidate("pyro-graph"),
    Candidate("pyro-enum"),
    Candidate("wake-wake"),
    Candidate("gumbel-softmax"),
    Candidate("reinforce"),
)
MEASURED = (
    "reinforce",
    "nvil",
    "vimco",
    "vimco-geometric",
    "loo",
    "ovis",
    "vimco+dreg",
    "loo+dreg",
    "vimco+stl",
    "vimco+resampled",
    "vimco+dreg+resampled",
    "vimco+common",
    "distinct",
    "distinct+wake",
    "rloo",
    "unordered-set",
    "sum-and-sample",
    "pyro-graph",
    "pyro-enum",
    "wake-wake",
    "tvo",
    "gumbel-softmax",
    "straight-through",
)
SWEPT = ("vimco", "loo", "loo+dreg", "rloo", "vimco+common")


@dataclass(frozen=True)
class LaboratoryConfig:
    """Compare gradient estimators."""

    data: Literal["glyphs", "omniglot"] = "glyphs"
    """Procedural glyphs, or Omniglot."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    out: Path = Path("runs/estimators")
    """Folder for runs and results."""
    resume: bool = False
    """Go on with what is in the folder `out`."""
    minutes: float | None = None
    """Training time of VIMCO; all others get its number of decoder evaluations, and 1.5 times its time at most.
    Default: 0.7 for glyphs, 1 for Omniglot."""
    final_minutes: tuple[float, ...] | None = None
    """Training times of VIMCO in the final, shortest first; the best of the others gets as many updates as fit in
    half of each. Default: 2 for glyphs, 4 and 8 for Omniglot."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps per convolution."""
    final_seeds: int = 2
    """Repetitions of the final, each with weights, episodes and draws of its own."""
    draws: int = 30
    """Gradients per estimator and table."""
    images: int = 8
    """Images per gradient in the tables."""
    test_images: int = 500
    """Test images."""
    test_samples: int = 100
    """Importance samples per test image."""
    seed: int = 0
    """Of weights, episodes and draws."""
    tiny: bool = False
    """Everything once, as small as it gets, to see that it runs."""

    def resolved(self) -> LaboratoryConfig:
        """With the defaults of the data, or the sizes of `tiny`."""
        if not self.tiny:
            final: tuple[float, ...]
            minutes, final = (1.0, (4.0, 8.0)) if self.data == "omniglot" else (0.7, (2.0,))
            final = tuple(sorted(set(self.final_minutes or final)))
            return replace(self, minutes=self.minutes or minutes, final_minutes=final)
        sizes: dict[str, Any] = {"width": 0.1, "draws": 2, "images": 3, "test_images": 4, "test_samples": 2}
        return replace(self, minutes=0.01, final_minutes=(0.01, 0.02), **sizes)


class Plan(NamedTuple):
    """What follows from the configuration."""

    trained: tuple[Candidate, ...]
    measured: tuple[str, ...]
    particles: tuple[int, ...]
    memories: tuple[int, ...]
    latent_dim: int
    classes: int
    shots: int


def plan_of(config: LaboratoryConfig) -> Plan:
    """All of it, or a little of everything."""
    if config.tiny:
        tiny = (Candidate("vimco", 2, 4), Candidate("vimco+dreg+resampled", 2, 4), Candidate("pyro-enum", 2, 4))
        return Plan(tiny, ("vimco", "loo", "rloo", "wake-wake"), (2, 4), (8, 12), 4, 3, 2)
    return Plan(TRAINED, MEASURED, (2, 4, 8, 16, 32, 64), (8, 32, 128), 64, 12, 3)


class Data(NamedTuple):
    """Disjoint classes."""

    train: Characters
    validation: Characters
    test: Characters


def load(config: LaboratoryConfig, name: str) -> Data:
    """Training, validation and test classes."""
    if name == "omniglot":
        return Data(*(omniglot.load(config.data_dir, split=s) for s in ("train", "validation", "evaluation")))
    everything, test = glyphs.load(classes=300, seed=0), glyphs.load(classes=100, seed=1)
    held_out = sorted(set(everything.alphabets))[-2:]
    return Data(everything.without_alphabets(held_out), everything.of_alphabets(held_out), test)


def build(config: LaboratoryConfig) -> tuple[Model, Guide]:
    """The same initial weights for every estimator."""
    torch.manual_seed(config.seed)
    networks = ConvNetworks(plan_of(config).latent_dim, width=config.width)
    return Model(networks), Guide(networks)


def sampler(config: LaboratoryConfig, characters: Characters, queries: int, **options: Any) -> EpisodeSampler:
    """Episodes of the shape that all are trained on."""
    plan = plan_of(config)
    shape: dict[str, Any] = {"classes": plan.classes, "shots": plan.shots, "queries": queries} | options
    return EpisodeSampler(characters, seed=shape.pop("seed", config.seed), **shape)


# (b) Training.


def train(
    config: LaboratoryConfig,
    data: Data,
    folder: Path,
    candidate: Candidate,
    *,
    minutes: float | None = None,
    updates: int | None = None,
    label: str = "",
) -> tuple[Model, Guide, Training]:
    """Train with one estimator, or go on with it."""
    name, K, queries, learning_rate = candidate
    model, guide = build(config)
    elbo = make(name, K)
    held_out = sampler(config, data.validation, 4 if config.tiny else 32, seed=1)  # the same for all
    validation = [held_out.sample() for _ in range(2 if config.tiny else 8)]
    cost = evaluations_of(elbo, model, guide, (validation[0].memory, validation[0].x))
    steps = TrainConfig(
        updates=updates,
        minutes=minutes,
        validate_every=2 if config.tiny else 250,
        log_every=1 if config.tiny else 50,
        validation_samples=8,
        learning_rate=learning_rate,
        patience=10**6,  # all are to use their whole budget
        seed=config.seed,
        accelerator="cpu",
    )
    stopped = ""
    try:
        result = fit(
            model,
            guide,
            elbo,
            sampler(config, data.train, queries, augment="rotations"),
            config=steps,
            folder=folder,
            validation=validation,
            identity={"estimator": name, "particles": K, "queries": queries, "width": config.width},
            resume=config.resume,
            label=label or name,
        )
        if result.interrupted:
            print("stopped; go on with --resume")
            sys.exit(128 + result.interrupted)
    except FloatingPointError as error:
        stopped = str(error)
    lines = read_metrics(folder / "metrics.jsonl")
    facts = {**candidate._asdict(), "evaluations": cost, "stopped": stopped, "seed": config.seed}
    return model, guide, Training.of_metrics(lines, **facts)


def train_and_score(
    config: LaboratoryConfig, data: Data, where: str, candidate: Candidate, **budget: Any
) -> tuple[Training, torch.Tensor]:
    """One run, and the NLL of each test image; kept in a file, and not done twice."""

    def run() -> dict[str, Any]:
        model, guide, training = train(config, data, config.out / "train" / where, candidate, **budget)
        if training.stopped:
            return {"training": training.plain(), "nll": []}
        episode = sampler(config, data.test, config.test_images, seed=2, shared_memory=False).sample()
        nll, kl = laboratory.score(model, guide, episode, samples=config.test_samples)
        training = training._replace(test_nll=Estimate.of(nll), test_kl_address=Estimate.of(kl))
        return {"training": training.plain(), "nll": nll.tolist()}

    content = once(config, f"train-{where}", run)
    return Training.of_plain(content["training"]), torch.tensor(content["nll"])


def against(judge: torch.Tensor, run: tuple[Training, torch.Tensor]) -> Training:
    """A run with its difference to VIMCO's, image by image."""
    training, nll = run
    if not len(nll) or not len(judge):
        return training
    return training._replace(test_minus_vimco=Estimate.of(nll - judge))


def train_all(config: LaboratoryConfig, data: Data) -> list[Training]:
    """All with VIMCO's decoder evaluations."""
    assert config.minutes is not None  # resolved
    first, *others = plan_of(config).trained
    judge, nll = train_and_score(config, data, first.folder, first, minutes=config.minutes)
    budget = judge.updates * judge.evaluations * judge.queries
    runs = [judge]
    for candidate in others:
        episode = sampler(config, data.validation, 4, seed=1).sample()
        cost = evaluations_of(make(*candidate[:2]), *build(config), (episode.memory, episode.x))
        updates = max(2, round(budget / (cost * candidate.queries)))
        limits: dict[str, Any] = {"minutes": 1.5 * config.minutes, "updates": updates}
        runs.append(against(nll, train_and_score(config, data, candidate.folder, candidate, **limits)))
    return runs


def train_finalists(config: LaboratoryConfig, data: Data, runs: Sequence[Training]) -> list[Training]:
    """The best VIMCO for longer, and the best of the others in half of its time, for each seed.

    Selected on held-out classes of the training alphabets; the test classes are scored, not looked at.
    """
    assert config.final_minutes is not None  # resolved
    ranked = sorted((r for r in runs if r.validation and not r.stopped), key=lambda r: r.validation[-1][2])
    judges = [candidate_of(run) for run in ranked if run.estimator == laboratory.JUDGE]
    rivals = [candidate_of(run) for run in ranked if run.estimator != laboratory.JUDGE]
    if not judges or not rivals:
        raise ValueError("training: expected a run of vimco and of another that did not diverge, got none")
    judge, rival = judges[0], rivals[0]
    # Other work on the machine slows one run and not the next: half of the time is a number of updates.
    cost = once(config, f"cost-{rival.folder}", partial(timed, config, data, rival, judge))["ratio"]
    finalists = []
    for minutes in config.final_minutes:
        for seed in range(config.seed, config.seed + config.final_seeds):
            seeded = replace(config, seed=seed)
            facts: dict[str, Any] = {"final_minutes": minutes}
            limits: dict[str, Any] = {"minutes": minutes, "label": f"vimco, {minutes:g} minutes, seed {seed}"}
            run, nll = train_and_score(seeded, data, final_folder(minutes, seed), judge, **limits)
            finalists.append(run._replace(**facts))
            limits = {
                "updates": max(2, round(run.updates / (2 * cost))),
                "label": f"{rival.estimator}, half of it",
            }
            scored = train_and_score(seeded, data, final_folder(minutes, seed) + "-half", rival, **limits)
            finalists.append(against(nll, scored)._replace(update_cost=cost, **facts))
    return finalists


def final_folder(minutes: float, seed: int) -> str:
    """Of VIMCO's run in the final."""
    return f"final-{minutes:g}-{seed}"


def candidate_of(run: Training) -> Candidate:
    """What a run trained."""
    return Candidate(run.estimator, run.num_particles, run.queries, run.learning_rate)


def timed(config: LaboratoryConfig, data: Data, candidate: Candidate, judge: Candidate) -> dict[str, float]:
    """Seconds per update over the judge's, both in turns; the median of the rounds."""
    steps = [updates_of(config, data, who) for who in (candidate, judge)]
    ratios = []
    for turn in range(3 if config.tiny else 60):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            next(steps[which])
            seconds[which] = time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
    return {"ratio": statistics.median(ratios[len(ratios) // 5 :])}  # without the first, which warm up


def updates_of(config: LaboratoryConfig, data: Data, candidate: Candidate) -> Iterator[None]:
    """One update after the other, as in training."""
    loss_fn = make(*candidate[:2])(*build(config))
    optimizer = torch.optim.Adam(loss_fn.parameters(), candidate.learning_rate, fused=True)
    for episode in sampler(config, data.train, candidate.queries, augment="rotations"):
        optimizer.zero_grad()
        (loss_fn(episode.memory, episode.x) / candidate.queries).backward()
        nn.utils.clip_grad_norm_(loss_fn.parameters(), 100.0)
        optimizer.step()
        yield


def once(config: LaboratoryConfig, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of the results: from its file, if an interrupted job has got so far, else computed and kept."""
    path = config.out / "parts" / f"{name}.json"
    if config.resume and path.exists():
        return json.loads(path.read_text())
    content = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    return content


def check_same(config: LaboratoryConfig) -> None:
    """Refuse to go on under another configuration: parts of both would stand on one page."""
    path = config.out / "config.json"
    present = {k: v for k, v in json.loads(json.dumps(asdict(config), default=str)).items() if k not in FREE}
    if path.exists():
        saved = json.loads(path.read_text())
        for name in sorted(saved.keys() | present.keys()):
            if saved.get(name) != present.get(name):
                raise ValueError(
                    f"resume: expected {name} = {saved.get(name)!r} as in {path}, got {present.get(name)!r}"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(present, indent=1) + "\n")


FREE = ("out", "resume", "data_dir")  # may differ between the sessions of one job


# (a) Gradient quality.


class Toy(nn.Module):
    """A mixture of Gaussians as a memory: an address, a latent near the entry, an observation near the latent."""

    def __init__(self, role: Literal["model", "guide"], parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.role = role
        self.p = nn.ParameterDict({name: nn.Parameter(value) for name, value in parameters.items()})

    def forward(self, x: torch.Tensor) -> None:
        """Model or guide of observations x [B]."""
        p = self.p
        with pyro.plate("data", len(x)):
            if self.role == "model":
                a = pyro.sample("address", dist.Categorical(logits=torch.zeros(len(x), len(p["entries"]))))
                z = pyro.sample("z", dist.Normal(self._read(p["entries"], a), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            else:
                logits = -p["sharpness"].exp() * (x[:, None] - p["centres"]) ** 2
                a = pyro.sample("address", dist.Categorical(logits=logits))
                pyro.sample("z", dist.Normal(0.6 * x + self._read(p["shift"], a), p["scale"].exp()))

    @staticmethod
    def _read(table: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (a * table).sum(-1) if a.is_floating_point() else table[a]


def measure_toy(config: LaboratoryConfig, evaluations: int, names: Sequence[str]) -> Quality:
    """Gradients on the mixture, whose addresses are summed for reference."""
    size, noise = 8, torch.Generator().manual_seed(config.seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=noise)

    entries = 2 * normal(size)
    model = Toy("model", {"entries": entries})
    guide = Toy(
        "guide",
        {
            "centres": entries + 0.5 * normal(size),
            "sharpness": torch.tensor(-1.0),
            "shift": 0.2 * entries + 0.2 * normal(size),
            "scale": torch.tensor(-0.5),
        },
    )
    x = entries[torch.randint(size, (config.images,), generator=noise)] + normal(config.images)

    def run() -> dict[str, Any]:
        facts: dict[str, Any] = {"program": "toy", "stage": "", "memory": size, "seed": config.seed}
        draws = 2 * config.draws
        return laboratory.measure(
            model, guide, (x,), names=names, evaluations=evaluations, draws=draws, **facts
        ).plain()

    return Quality.of_plain(once(config, f"toy-{evaluations}-{len(names)}", run))


def measure_model(
    config: LaboratoryConfig,
    data: Data,
    pair: tuple[Model, Guide],
    *,
    program: str,
    stage: str,
    names: Sequence[str],
    evaluations: int = 4,
    shape: tuple[int, int] | None = None,
) -> Quality:
    """Gradients of one model on held-out classes; `shape` is classes and shots of the memory."""
    plan = plan_of(config)
    classes, shots = shape or (plan.classes, plan.shots)
    episode = sampler(config, data.validation, config.images, classes=classes, shots=shots, seed=3).sample()
    args = (episode.memory, episode.x)

    def run() -> dict[str, Any]:
        facts: dict[str, Any] = {
            "program": program,
            "stage": stage,
            "memory": classes * shots,
            "seed": config.seed,
        }
        return laboratory.measure(
            *pair, args, names=names, evaluations=evaluations, draws=config.draws, **facts
        ).plain()

    key = f"{program}-{stage}-{classes * shots}-{evaluations}-{len(names)}"
    return Quality.of_plain(once(config, key, run))


def stages_of(
    config: LaboratoryConfig, name: str, data: Data, finalist: Candidate
) -> dict[str, tuple[Model, Guide]]:
    """VIMCO's model before training, after `minutes`, and at the end of its long run."""
    assert config.minutes is not None
    assert config.final_minutes is not None
    judge, longest = plan_of(config).trained[0], config.final_minutes[-1]
    own = {"middle": judge.folder, "end": final_folder(longest, config.seed)}
    again = replace(config, resume=True)  # the data's own two runs are finished, and only loaded
    found = {"start": build(config)}
    for stage, who, minutes in (("middle", judge, config.minutes), ("end", finalist, longest)):
        where = config.out / "train" / own[stage]
        if name != config.data:  # a comparison on the side: a quarter of the time is enough
            where, minutes = config.out / "stages" / f"{name}-{stage}", minutes / 4
        model, guide, _ = train(again, data, where, who, minutes=minutes, label=f"{name}, {stage}")
        found[stage] = (model, guide)
    return found


def measure_all(
    config: LaboratoryConfig, data: Data, finalist: Candidate
) -> tuple[list[Quality], list[Quality], list[Quality]]:
    """All estimators at the stages of training; some for growing K, and for growing memories."""
    plan = plan_of(config)
    swept = [name for name in SWEPT if name in plan.measured]
    stages = [measure_toy(config, 4, plan.measured)]
    particles = [measure_toy(config, k, swept) for k in plan.particles]
    memories: list[Quality] = []
    for name in dict.fromkeys(("glyphs", config.data)):
        own = data if name == config.data else load(config, name)
        for stage, pair in stages_of(config, name, own, finalist).items():
            stages.append(measure_model(config, own, pair, program=name, stage=stage, names=plan.measured))
            if name != config.data:
                continue
            what: dict[str, Any] = {"program": name, "stage": stage, "names": swept}
            particles += [measure_model(config, own, pair, evaluations=k, **what) for k in plan.particles]
            memories += [measure_model(config, own, pair, shape=(m // 4, 4), **what) for m in plan.memories]
    return stages, particles, memories


# (c) The page.


def main(config: LaboratoryConfig) -> None:
    """Train, measure, write."""
    config = config.resolved()
    assert config.final_minutes is not None
    keep_freed_memory()
    pyro.settings.set(module_local_params=True)
    pyro.enable_validation(False)
    if config.out.exists() and any(config.out.iterdir()) and not config.resume:
        raise ValueError(f"out: expected a new or empty folder, or --resume, got {config.out}")
    check_same(config)
    start = time.monotonic()
    data = load(config, config.data)
    training = train_all(config, data)
    final = train_finalists(config, data, training)
    stages, particles, memories = measure_all(config, data, candidate_of(final[0]))
    plan = plan_of(config)
    minutes = (time.monotonic() - start) / 60
    about = (
        f"Data: {config.data}; memories of {plan.classes} classes x {plan.shots} examples; networks of width",
        f"{config.width}; seed {config.seed}. Tables: {config.draws} gradients (toy: {2 * config.draws}) of",
        f"{config.images} held-out images each; the middle of training is VIMCO's model after {config.minutes:g}",
        f"minutes, the end after {config.final_minutes[-1]:g}. Test NLL, mean ± standard error: upper bound",
        f"from {config.test_samples} samples, {config.test_images} images, each with a memory of its own.",
        f"{minutes:.0f} minutes in the last session, {torch.get_num_threads()} threads,",
        f"torch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}.",
    )
    found = Findings(
        command(), about, tuple(stages), tuple(particles), tuple(memories), tuple(training), tuple(final)
    )
    write(config, found)
    print((config.out / "estimators.md").read_text().split("## All figures")[0])


def write(config: LaboratoryConfig, found: Findings) -> None:
    """estimators.md, estimators.json and the pictures."""
    plain = {
        "command": found.command,
        "about": found.about,
        **{name: [q.plain() for q in getattr(found, name)] for name in ("stages", "particles", "memories")},
        **{name: [r.plain() for r in getattr(found, name)] for name in ("training", "final")},
    }
    write_text(config.out / "estimators.json", json.dumps(plain, indent=1) + "\n")
    write_text(config.out / "estimators.md", to_markdown(found))
    for name, runs in (("training.png", found.training), ("final.png", found.final)):
        seen = [run for run in runs if run.validation]
        plots.save_curves(
            config.out / name,
            {name_of(run): run.validation for run in seen},
            {name_of(run): run.kl_address for run in seen},
        )
    end = [q for q in found.particles if q.program == config.data and q.stage == "end"]
    plots.save_slopes(config.out / "slopes.png", [q.evaluations for q in end], snr_of(end))


def name_of(run: Training) -> str:
    """In the pictures."""
    final = "" if run.final_minutes is None else f", final {run.final_minutes:g}, seed {run.seed}"
    return run.label + final


def command() -> str:
    """How this was called."""
    return shlex.join(
        ["uv", "run", "experiments/compare_estimators.py", *(a for a in sys.argv[1:] if a != "--resume")]
    )


def cli(arguments: Sequence[str] | None = None) -> None:
    """Run with command-line arguments; bad input ends in one line, not in a traceback."""
    try:
        main(tyro.cli(LaboratoryConfig, description=__doc__, args=arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    cli()
