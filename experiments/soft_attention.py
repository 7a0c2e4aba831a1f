"""Hard against soft attention on the same networks, trained as long: what distractors do to each.

The hard lookup of the paper; soft attention, whose read is a mean of all entries weighted by z; the same with a
posterior that also reads by looking for its target; and no memory at all. NLL and classification by the number of
classes in memory, one of which is the target's. (Seconds per update: `benchmarks/attention.py`.) Writes
results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common import kept, plots, protocols, results
from common.several import Session, SeveralConfig, begin, small, train_or_load
from common.train import TrainOptions
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean, TwoPhase
from vma_pyro.training import TrainConfig

PROGRAMS = {
    "hard": "memory",
    "soft": "soft",
    "soft, target-guided": "soft-guided",
    "no memory": "memoryless",
}


@dataclass(frozen=True)
class SoftConfig(SeveralConfig):
    """Train hard and soft attention alike, and test them among growing numbers of distractors."""

    out: Path = Path("runs/soft_attention")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    train_classes: int = 8
    """Classes in the training memory."""
    train_shots: int = 4
    """Examples of each class in the training memory."""
    classes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Classes in the test memories."""
    shots: tuple[int, ...] = (1, 4)
    """Examples of each class in the test memories."""
    tasks: tuple[tuple[int, int], ...] = ((2, 1), (4, 1), (5, 1), (8, 1), (16, 1), (20, 1), (5, 5), (20, 5))
    """Classes and examples of the classification tasks."""
    draws: int = 10
    """Samples of z for the weights of a soft read."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(updates=12000))
    """Training of each model."""

    def resolved(self) -> SoftConfig:
        """Fill in the tiny sizes, if they are wanted."""
        sizes: dict[str, Any] = {"train_classes": 2, "train_shots": 1, "classes": (1, 2), "shots": (1,)}
        return replace(self, **small(self), **sizes, tasks=((2, 1),), draws=2) if self.tiny else self


def score(name: str, pair: models.Pair, session: Session, config: SoftConfig) -> dict[str, Any]:
    """NLL of every target under every memory, and the accuracy of every task."""
    nested, device = session.nested, session.device
    nlls, accuracies = [], []
    for shots in config.shots:
        for classes in config.classes if name != "no memory" else config.classes[:1]:
            targets = partial(nested.episodes, classes, shots)
            found = protocols.nll(pair, targets, config.samples, device=device)
            nlls.append({"model": name, "classes": classes, "shots": shots, **found.plain()})
    for ways, shots in config.tasks if name != "no memory" else ():
        how: Any = "guide" if name == "hard" else "attention"
        share = protocols.accuracy(
            pair, nested.episodes(ways, shots), device=device, by=how, num_samples=config.draws
        )
        accuracies.append({"model": name, "ways": ways, "shots": shots, "accuracy": share._asdict()})
    return {"nll": nlls, "accuracy": accuracies}


def main(config: SoftConfig) -> None:
    """Train and test all models, and write."""
    config = config.resolved()
    session = begin(config)
    group = session.group()
    nlls, accuracies = [], []
    for name, program in PROGRAMS.items():
        key = name.replace(", ", "_").replace(" ", "_").replace("-", "_")
        shape: dict[str, Any] = {"classes": config.train_classes, "shots": config.train_shots}
        pair, facts = train_or_load(config, key, session.data, **shape, program=program, updates=group.updates)
        group.add(name, models.on(session.device, pair), facts)
        found = kept.once(config, key, partial(score, name, pair, session, config))
        nlls += found["nll"]
        accuracies += found["accuracy"]
    head = results.header(config, since=session.since, device=session.device, training=group.training)
    write({**head, "nll": pair_with_hard(nlls), "accuracy": accuracies}, config)


def pair_with_hard(nlls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each NLL, and how much more it is than with the hard lookup, paired by target."""
    scores = {(r["model"], r["classes"], r["shots"]): TwoPhase.read(r) for r in nlls}
    rows = []
    for (model, classes, shots), found in scores.items():
        more = found.minus(scores["hard", classes, shots]).estimate()
        row = {"model": model, "classes": classes, "shots": shots, "nll": found.estimate()._asdict()}
        rows.append({**row, "more_than_hard": more._asdict()})
    return rows


def write(content: dict[str, Any], config: SoftConfig) -> None:
    """Write results.json, report.md and the picture."""
    about = (
        f"All models: the same networks, {config.train.updates or config.train.minutes} "
        f"{'updates' if config.train.updates else 'minutes'} with {config.train_classes} classes x "
        f"{config.train_shots} examples in memory. {config.samples.about(content['nll'][0]['nll']['n'])} The same "
        "images everywhere. In brackets how much more than with the hard lookup, paired by image."
    )
    parts = [about]
    for shots in config.shots:
        found = {(r["model"], r["classes"]): r for r in content["nll"] if r["shots"] == shots}
        lines = [
            [name, *(nll_cell(found.get((name, c)), hard=name == "hard") for c in config.classes)]
            for name in PROGRAMS
        ]
        head = ["model", *(results.plural(classes, "class") for classes in config.classes)]
        parts += [f"## NLL, {results.plural(shots, 'example')} of each class", table(head, lines)]
    shares = {(r["model"], r["ways"], r["shots"]): Mean.read(r["accuracy"]) for r in content["accuracy"]}
    lines = [
        [name, *(results.percent(shares[name, *task]) for task in config.tasks)] for name in list(PROGRAMS)[:3]
    ]
    head = ["model", *(f"{ways}-way {shots}-shot" for ways, shots in config.tasks)]
    parts += ["## Correct, %", "Hard: by q(a|x). Soft: by the weights of the read.", table(head, lines)]
    by_classes = partial(draw, rows=content["nll"], config=config)
    picture = results.Picture(f"{config.out.name}.png", "NLL by classes", by_classes)
    results.write(config.out, content, "Hard against soft attention", [*parts, picture])


def nll_cell(row: dict[str, Any] | None, *, hard: bool) -> str:
    """The NLL of one model and memory, as the table shows it."""
    if row is None:
        return ""
    nll, more = Mean.read(row["nll"]), Mean.read(row["more_than_hard"])
    return str(nll) if hard else results.compared(nll, more)


def draw(path: Path, rows: Sequence[dict[str, Any]], config: SoftConfig) -> None:
    """NLL against classes, and the gap to the hard lookup."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "nll", "NLL"), (right, "more_than_hard", "NLL over hard's")):
        curves = {
            f"{name}, {shots} of each": [
                (r["classes"], r[key]["mean"], r[key]["se"])
                for r in rows
                if (r["model"], r["shots"]) == (name, shots)
            ]
            for name in list(PROGRAMS)[:3]
            for shots in config.shots
            if key == "nll" or name != "hard"
        }
        without = next(r["nll"]["mean"] for r in rows if r["model"] == "no memory")
        if key == "nll":
            curves["no memory"] = [(c, without, None) for c in config.classes]
        # The right one leaves the hard lookup out, from which each curve is the distance: the other colours stay.
        first = 0 if key == "nll" else len(config.shots)
        y = f"{label}, nats per image"
        plots.draw_lines(axes, curves, x="classes in memory", y=y, log=True, dashed="no", first_colour=first)
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main, SoftConfig, __doc__)
