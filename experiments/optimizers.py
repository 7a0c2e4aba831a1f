"""How far an optimizer gets in a given time: Muon and Adam from scratch, at equal seconds.

Seconds of an update are measured first, in turns, and each optimizer is given as many updates as fit into the
budgets: what else the machine does meanwhile decides nothing. With `--updates` each makes as many, instead: so
precisions are compared, as in `--optimizers muon@32-true muon@bf16-mixed`. Scores are those of held-out training
alphabets; the test alphabets are not looked at. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import kept, plots, protocols, results
from common.several import Session, SeveralConfig, begin, small, train_or_load, training_episodes
from common.timing import take_turns
from common.train import TrainOptions, as_many, make_elbo
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro.data import NestedEpisodes
from vma_pyro.evaluation import Mean, TwoPhase
from vma_pyro.training import TrainConfig
from vma_pyro.training.captured import Captured
from vma_pyro.training.run import Run


@dataclass(frozen=True)
class OptimizersConfig(SeveralConfig):
    """Train one architecture by several optimizers, in the same time."""

    out: Path = Path("runs/optimizers")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    width: float = 0.5
    """Factor on the paper's 48 and 64 maps per convolution."""
    estimator: str = "vimco+dreg+resampled"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`."""
    optimizers: tuple[str, ...] = ("adam", "muon")
    """Names of optimizers; or with a learning rate, adam:3e-3; or in a precision, adam@32-true. Differences are
    from the first."""
    budgets: tuple[float, ...] = (8.0, 40.0)
    """In minutes of training, each a run of its own, as the learning rate follows it; not with `updates`."""
    seeds: tuple[int, ...] = (0, 1)
    """Of initial weights, noise and episodes."""
    classes: int = 12
    """Classes in the training memory."""
    shots: int = 3
    """Examples of each class in the training memory."""
    test_shots: tuple[int, ...] = (1, 5, 19)
    """Examples of one class in the memories of the likelihoods."""
    tasks: tuple[tuple[int, int], ...] = ((20, 1), (20, 5))
    """Classes and examples of the classification tasks."""
    images: int = 500
    """Images of held-out alphabets, the same for all."""
    seconds: tuple[float, ...] = ()
    """Seconds of an update of each optimizer; default: measured here."""
    rounds: int = 20
    """Updates of each that are timed."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(patience=10**6))
    """Training; optimizer, learning rate, budget and seed are those above."""

    def resolved(self) -> OptimizersConfig:
        """Fill in the tiny sizes, if they are wanted."""
        sizes: dict[str, Any] = {"classes": 2, "shots": 1, "test_shots": (1, 2), "tasks": ((2, 1),), "rounds": 1}
        if not self.tiny:
            return self
        tiny: dict[str, Any] = small(self) | sizes | {"budgets": (1e-9,), "seeds": (0,)}
        return replace(self, **(tiny | {"train": replace(tiny["train"], updates=self.train.updates)}))

    def steps(self, optimizer: str) -> TrainConfig:
        """How one of them trains."""
        what, _, precision = optimizer.partition("@")
        name, _, rate = what.partition(":")
        try:
            chosen: dict[str, Any] = {"learning_rate": float(rate)} if rate else {}
            chosen |= {"precision": precision} if precision else {}
            return replace(self.train, optimizer=name, **chosen)
        except ValueError as error:
            raise ValueError(f"optimizers: {error}") from error


class Item(NamedTuple):
    """One run."""

    optimizer: str
    minutes: float | None
    seed: int
    updates: int

    @property
    def name(self) -> str:
        """Of its folder."""
        budget = f"{self.updates}_updates" if self.minutes is None else f"{self.minutes:g}"
        return f"{self.optimizer.replace(':', '_').replace('@', '_')}-{budget}-{self.seed}"


def updates_in(minutes: float | None, seconds: float | None, config: OptimizersConfig) -> int:
    """Updates of a run: those that fit into a budget, or those asked for."""
    if minutes is None or seconds is None:
        assert config.train.updates is not None
        return config.train.updates
    return max(1, round(60 * minutes / seconds))


def seconds_of_updates(config: OptimizersConfig, session: Session) -> dict[str, Any]:
    """Time updates of each in turns: the medians."""
    episodes = training_episodes(config, session.data, classes=config.classes, shots=config.shots)
    few = [episodes.sample().to(session.device) for _ in range(4)]

    def updates(optimizer: str) -> Callable[[], object]:
        pair = architecture(config)
        # Of one update, so that progress is 1 after it: Muon, and not Adam as in the first part of its run.
        steps = replace(config.steps(optimizer), updates=1)
        run = Run(*pair, make_elbo(config.estimator, config.particles), episodes, steps, config.out)
        if isinstance(run.loss, Captured):
            run.loss.wait = 0
        endless = iter(few * (config.rounds + 10))
        return lambda: run.make_update(next(endless))

    turns = {optimizer: updates(optimizer) for optimizer in config.optimizers}
    found = take_turns(turns, repetitions=config.rounds, device=session.device, label="seconds of updates")
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def architecture(config: OptimizersConfig) -> models.Pair:
    """Networks with new weights."""
    torch.manual_seed(0)
    return models.build(
        {"networks": "conv", "width": config.width, "latent_dim": config.latent_dim, "program": "memory"}
    )


def score(pair: models.Pair, nested: NestedEpisodes, config: OptimizersConfig, device: Any) -> dict[str, Any]:
    """NLL of every image of the held-out alphabets by shots, and accuracies."""
    pair = models.on(device, pair)
    nlls = [
        {"shots": n, **protocols.nll(pair, partial(nested.episodes, 1, n), config.samples, device=device).plain()}
        for n in config.test_shots
    ]
    shares = [protocols.accuracy(pair, nested.episodes(*task), device=device)._asdict() for task in config.tasks]
    return {"nll": nlls, "accuracy": shares}


def train_and_score(
    config: OptimizersConfig, session: Session, item: Item
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run: facts about its training, and its scores on classes that it has not seen."""
    train = replace(as_many(config.steps(item.optimizer), item.updates), seed=item.seed)
    mine = replace(config, train=train)
    pair, facts = train_or_load(mine, item.name, session.data, classes=config.classes, shots=config.shots)
    nested = NestedEpisodes(session.data.validation, images=config.images, seed=0)
    scores = partial(score, pair, nested, config, session.device)
    return facts, {"updates": facts["updates"], **kept.once(config, f"{item.name}-scores", scores)}


def main(config: OptimizersConfig) -> None:
    """Train and score all, and write."""
    config = config.resolved()
    for optimizer in config.optimizers:
        config.steps(optimizer)
    if config.seconds and (len(config.seconds) != len(config.optimizers) or not min(config.seconds) > 0):
        raise ValueError(
            f"seconds: expected one number above 0 for each of {len(config.optimizers)} optimizers, got "
            f"{' '.join(map(str, config.seconds))}"
        )
    session = begin(config)
    seconds = dict(zip(config.optimizers, config.seconds, strict=False))
    if not seconds and config.train.updates is None:
        seconds = kept.once(config, "seconds", partial(seconds_of_updates, config, session))
    items = [
        Item(optimizer, minutes, seed, updates_in(minutes, seconds.get(optimizer), config))
        for minutes in (config.budgets if config.train.updates is None else (None,))
        for seed in config.seeds
        for optimizer in config.optimizers
    ]
    found = [train_and_score(config, session, item) for item in items]
    training = {item.name: facts for item, (facts, _) in zip(items, found, strict=True)}
    rows = [item._asdict() | scores for item, (_, scores) in zip(items, found, strict=True)]
    head = results.header(config, since=session.since, device=session.device, training=training)
    write({**head, "seconds": seconds, "rows": against_first(rows)}, config)


def against_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each NLL, and how much less it is than the first optimizer's in the same time, paired by image."""
    found: list[dict[str, Any]] = []
    first: dict[Any, Any] = {}
    for row in copy.deepcopy(list(rows)):
        base = first.setdefault((row["minutes"], row["seed"]), row["nll"])
        row["nll"] = [
            {
                "shots": own["shots"],
                "nll": TwoPhase.read(own).estimate()._asdict(),
                "more": TwoPhase.read(own).minus(TwoPhase.read(theirs)).estimate()._asdict(),
            }
            for own, theirs in zip(row["nll"], base, strict=True)
        ]
        found.append(row)
    return found


def write(content: dict[str, Any], config: OptimizersConfig) -> None:
    """Write results.json, report.md and the picture."""
    rows, seconds = content["rows"], content["seconds"]
    first = config.optimizers[0]
    times = [
        "## Time of an update",
        table(
            ["optimizer", "seconds of an update", f"over {first}"],
            [[name, f"{s:.3f}", f"{s / seconds[first]:.2f}"] for name, s in seconds.items()],
        ),
    ]
    lines = [
        [
            "" if row["minutes"] is None else f"{row['minutes']:g}",
            row["seed"],
            row["optimizer"],
            f"{row['updates']:,}",
            *(nll_cell(cell, first=row["optimizer"] == first) for cell in row["nll"]),
            *(results.percent(Mean.read(share)) for share in row["accuracy"]),
        ]
        for row in rows
    ]
    head = ["minutes", "seed", "optimizer", "updates", *(results.plural(n, "shot") for n in config.test_shots)]
    head += [f"{ways}-way {shots}-shot, %" for ways, shots in config.tasks]
    about = (
        f"From scratch, width {config.width:g}, `{config.estimator}` with K = {config.particles}, "
        f"{config.queries} images per update, {config.classes} classes x {config.shots} examples in memory. "
        f"Images of held-out training alphabets; {config.samples.about(rows[0]['nll'][0]['nll']['n'])} In "
        f"brackets how much more than with {first} in the same budget, paired by image."
    )
    curves = {
        f"{row['optimizer']}, seed {row['seed']}": [
            (cell["shots"], cell["nll"]["mean"], cell["nll"]["se"]) for cell in row["nll"]
        ]
        for row in rows
        if row["minutes"] == rows[-1]["minutes"]
    }
    axes: dict[str, Any] = {"x": "examples of the class", "y": "NLL, nats per image", "log": True}
    draw = partial(plots.save_lines, lines=curves, **axes)
    picture = results.Picture(f"{config.out.name}.png", "The longest runs: NLL by shots", draw)
    results.write(
        config.out,
        content,
        f"Optimizers at equal {'seconds' if seconds else 'updates'}",
        [about, *(times if seconds else []), "## Scores", table([*head], lines), picture],
    )


def nll_cell(cell: dict[str, Any], *, first: bool) -> str:
    """The NLL at one number of shots, as the table shows it."""
    nll, more = Mean.read(cell["nll"]), Mean.read(cell["more"])
    return str(nll) if first else results.compared(nll, more)


if __name__ == "__main__":
    cli.run(main, OptimizersConfig, __doc__)
