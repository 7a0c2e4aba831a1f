"""Where the nats go, by examples per class (figure 4B of the paper): KL(a), KL(z) and NLL.

A model is trained for each number of examples of 8 classes in memory and tested with as many: with more examples
the lookup says more (KL(a) rises, to at most log |M|), less is left for z to say, and images cost fewer nats.
45 alphabets to train on, 5 to test. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from common import kept, plots, protocols, results
from common.several import Session, SeveralConfig, begin, small, train_or_load
from common.train import TrainOptions
from paper import published
from vma_pyro import cli, models
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean
from vma_pyro.training import TrainConfig


@dataclass(frozen=True)
class SplitConfig(SeveralConfig):
    """Train and take apart a model for each number of examples per class."""

    data: Literal["glyphs", "omniglot", "omniglot-45"] = "omniglot-45"
    """Procedural glyphs, Omniglot's canonical split, or 45 of its alphabets against 5."""
    out: Path = Path("runs/kl_split")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    classes: int = 8
    """Classes in the memory."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Examples of each class in the memory, in training and test."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(updates=8000))
    """Training of each model."""

    def resolved(self) -> SplitConfig:
        """Fill in the tiny sizes, if they are wanted."""
        return replace(self, **small(self), classes=2, shots=(1, 2)) if self.tiny else self


def score(pair: models.Pair, session: Session, config: SplitConfig, shots: int) -> dict[str, Any]:
    """The bound of the targets taken apart, nats per image."""
    device, samples = session.device, config.samples
    targets = partial(session.nested.episodes, config.classes, shots)
    names = ("kl_address", "kl_z", "reconstruction", "right_class")
    parts = protocols.split(pair, targets(), names, num_samples=samples.few, device=device)
    nll = protocols.nll(pair, targets, samples, device=device).estimate()
    size = config.classes * shots
    return {"shots": shots, "entries": size, "log_memory": math.log(size), "nll": nll._asdict(), **parts}


def as_many_targets(config: SplitConfig, left: int) -> SplitConfig:
    """Keep the number of targets in training, in more updates if the memory's classes leave too few for one."""
    queries, train = min(config.queries, left), config.train
    if train.updates is not None:
        train = replace(train, updates=train.updates * config.queries // queries)
    return replace(config, queries=queries, train=train)


def main(config: SplitConfig) -> None:
    """Train and test all models, and write."""
    config = config.resolved()
    session = begin(config)
    data, device = session.data, session.device
    training, rows = {}, []
    for shots in config.shots:
        name = f"{shots}_examples"
        mine = as_many_targets(config, config.classes * (data.train.examples - shots))
        pair, training[name] = train_or_load(mine, name, data, classes=config.classes, shots=shots)
        todo = partial(score, models.on(device, pair), session, config, shots)
        rows.append(kept.once(config, name, todo))
    head = results.header(config, since=session.since, device=device, training=training)
    write({**head, "rows": rows}, config)


def write(content: dict[str, Any], config: SplitConfig) -> None:
    """Write results.json, report.md and the picture."""
    names = ("kl_address", "kl_z", "reconstruction", "nll")
    lines = [
        [row["shots"], row["entries"], f"{row['log_memory']:.2f}", *(Mean.read(row[name]) for name in names)]
        for row in content["rows"]
    ]
    paper = published.VMA_SPLIT
    lines += [
        [
            f"VMA, {shots} (recalled)",
            8 * shots,
            f"{math.log(8 * shots):.2f}",
            paper["kl_address"][i],
            paper["kl_z"][i],
        ]
        + ["", paper["nll"][i]]
        for i, shots in enumerate((1, 16))
    ]
    about = (
        f"One model for each row, trained alike and on as many targets, {config.queries} an update or, in more "
        f"updates, as many as the memory's classes leave; {config.classes} classes in memory. "
        f"{config.samples.about(content['rows'][0]['nll']['n'])} The same images in all rows. The "
        "parts are those of the single-sample bound."
    )
    head = ["examples per class", "S = |M|", "log S", "KL(a)", "KL(z)", "minus reconstruction", "NLL"]
    curves = results.Picture(f"{config.out.name}.png", "KL(a), KL(z), NLL", partial(draw, rows=content["rows"]))
    parts: list[str | results.Picture] = [about, table(head, lines), curves]
    results.write(config.out, content, "Where the nats go, by examples per class", parts)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """KL(a), KL(z) and NLL against the examples per class."""
    paper = published.VMA_SPLIT
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 3), ("kl_address", "kl_z", "nll"), ("KL(a)", "KL(z)", "NLL"), strict=True
    ):
        points = {"ours": [(r["shots"], r[name]["mean"], r[name]["se"]) for r in rows]}
        points["VMA"] = [(1, paper[name][0], None), (16, paper[name][1], None)]
        if name == "kl_address":
            points["log |M|"] = [(r["shots"], r["log_memory"], None) for r in rows]
        plots.draw_lines(axes, points, x="examples per class", y=f"{label}, nats per image", log=True)
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main, SplitConfig, __doc__)
