"""What turned characters are worth: models trained alike, without and with rotations as classes of their own.

Turning every training character by 90, 180 and 270 degrees gives four times as many classes, which is another
task than the paper's: the row without is the matched comparison. The test classes are never turned. Writes
results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import kept, plots, protocols, results
from common.several import Session, SeveralConfig, begin, small, train_or_load
from common.train import TrainOptions
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean, TwoPhase
from vma_pyro.training import TrainConfig


@dataclass(frozen=True)
class AugmentationConfig(SeveralConfig):
    """Train a model with turned classes, `augment`, and one without, and test them alike."""

    out: Path = Path("runs/augmentation")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    classes: int = 12
    """Classes in the training memory."""
    shots: int = 3
    """Examples of each class in the training memory."""
    test_shots: tuple[int, ...] = (1, 2, 5, 10, 19)
    """Examples of one class in the test memories."""
    tasks: tuple[tuple[int, int], ...] = protocols.TASKS
    """Classes and examples of the classification tasks."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(updates=8000))
    """Training of each model."""

    def resolved(self) -> AugmentationConfig:
        """Fill in the tiny sizes, if they are wanted."""
        sizes: dict[str, Any] = {"classes": 2, "shots": 1, "test_shots": (1, 2), "tasks": ((2, 1),)}
        return replace(self, **small(self), **sizes) if self.tiny else self


def score(pair: models.Pair, session: Session, config: AugmentationConfig) -> dict[str, Any]:
    """NLL of every target under every memory, and the accuracy of every task."""
    nested, device = session.nested, session.device
    nlls, shares = [], []
    for shots in config.test_shots:
        found = protocols.nll(pair, partial(nested.episodes, 1, shots), config.samples, device=device)
        nlls.append({"shots": shots, **found.plain()})
    for ways, shots in config.tasks:
        share = protocols.accuracy(pair, nested.episodes(ways, shots), device=device)
        shares.append({"ways": ways, "shots": shots, "accuracy": share._asdict()})
    return {"nll": nlls, "accuracy": shares}


def main(config: AugmentationConfig) -> None:
    """Train and test both models, and write."""
    config = config.resolved()
    if config.augment == "none":
        raise ValueError("augment: expected rotations or rotations+flips, to compare with none, got none")
    session = begin(config)
    group = session.group(but_for="augment")
    rows = []
    for mine in (replace(config, augment="none"), config):
        kind, name = mine.augment, mine.augment.replace("+", "_")
        pair, facts = train_or_load(
            mine, name, session.data, classes=config.classes, shots=config.shots, updates=group.updates
        )
        group.add(kind, models.on(session.device, pair), facts)
        found = kept.once(config, f"{name}-scores", partial(score, pair, session, config))
        rows.append({"augment": kind, **found})
    head = results.header(config, since=session.since, device=session.device, training=group.training)
    write({**head, "rows": pair_with_first(rows)}, config)


def pair_with_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each NLL, and how much more it is than the first model's, paired by target."""
    found = []
    for row in rows:
        nlls = []
        for own, plain in zip(row["nll"], rows[0]["nll"], strict=True):
            nll = TwoPhase.read(own)
            more = nll.minus(TwoPhase.read(plain)).estimate()
            nlls.append({"shots": own["shots"], "nll": nll.estimate()._asdict(), "more": more._asdict()})
        found.append({**row, "nll": nlls})
    return found


def write(content: dict[str, Any], config: AugmentationConfig) -> None:
    """Write results.json, report.md and the picture."""
    rows = content["rows"]
    about = (
        f"Models trained alike, {config.classes} classes x {config.shots} examples in memory; with rotations, "
        "there are four times as many classes to draw them from. "
        f"{config.samples.about(rows[0]['nll'][0]['nll']['n'])} One class in memory; in brackets how much more "
        "than without turned classes, paired by image."
    )
    lines = [[row["augment"], *(nll_cell(cell, first=row is rows[0]) for cell in row["nll"])] for row in rows]
    head = ["added classes", *(results.plural(shots, "shot") for shots in config.test_shots)]
    shares = [
        [row["augment"], *(results.percent(Mean.read(cell["accuracy"])) for cell in row["accuracy"])]
        for row in rows
    ]
    tasks = ["added classes", *(f"{ways}-way {shots}-shot" for ways, shots in config.tasks)]
    curves = {
        row["augment"]: [(cell["shots"], cell["nll"]["mean"], cell["nll"]["se"]) for cell in row["nll"]]
        for row in rows
    }
    axes: dict[str, Any] = {"x": "examples of the class", "y": "NLL, nats per image", "log": True}
    draw = partial(plots.save_lines, lines=curves, **axes)
    by_shots = results.Picture(f"{config.out.name}.png", "NLL by shots", draw)
    parts = [about, "## NLL", table(head, lines), "## Correct by q(a|x), %", table(tasks, shares)]
    results.write(config.out, content, "Turned characters as training classes", [*parts, by_shots])


def nll_cell(cell: dict[str, Any], *, first: bool) -> str:
    """The NLL at one number of shots, as the table shows it."""
    nll, more = Mean.read(cell["nll"]), Mean.read(cell["more"])
    return str(nll) if first else results.compared(nll, more)


if __name__ == "__main__":
    cli.run(main, AugmentationConfig, __doc__)
