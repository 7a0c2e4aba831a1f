"""Table 1 of the paper: NLL by number of classes and of examples in memory, for every published way of counting.

Shots per class (as in the paper), and images in all (as in Generative Matching Networks), where the target's class
may be absent. Without replacement and without the target, and once with the sampler of GMN, which draws with
replacement and from the target as well. With the address sampled, and summed exactly. One trained model, the same
targets in every cell. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common import folder, kept, plots, protocols, results
from common.protocols import TINY
from common.subject import Subject, TestConfig, load_subject
from paper import published
from vma_pyro import cli, pretrained
from vma_pyro._system.markdown import table
from vma_pyro.data import NestedEpisodes
from vma_pyro.evaluation import Mean, TwoPhase

WAYS = {
    "shots per class": "As many entries as classes x shots; the target's class is among them",
    "images in all": "As many entries as shots; the target's class may be absent",
    "images in all, with replacement": "As GMN's public sampler: the target itself may be among the entries",
}


@dataclass(frozen=True)
class TableConfig(TestConfig):
    """Score a trained model in every cell of Table 1."""

    out: Path = Path("runs/table1")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    classes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Classes in the memory: the rows of the table."""
    shots: tuple[int, ...] = published.SHOTS
    """Examples of each class: the columns."""
    images: int = 5000
    """Test images, the same in every cell."""
    refine: int = 0
    """Steps of refinement of q(z | x, m) for each of the corrected images, for a table of its own; 0 for none."""
    only: Literal["all", "shots per class"] = "all"
    """All ways of counting, or the paper's own alone."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        super().__post_init__()
        cli.check_sizes(self, "refine", least=0)

    def resolved(self) -> TableConfig:
        """Fill in the tiny sizes, if they are wanted."""
        small: dict[str, Any] = {"classes": (1, 2), "shots": (1, 2), "images": 4, "refine": 1}
        return replace(self, **small, samples=TINY) if self.tiny else self


class Memories(NamedTuple):
    """The memories of one cell of a table."""

    way: str
    classes: int
    shots: int

    def kinds(self, config: TableConfig) -> tuple[str, ...]:
        """How the address is treated, or q(z | x, m) as well: more ways where the paper's own figures stand."""
        if self.way != "shots per class":
            return ("sampled",)
        return ("sampled", "exact", *(("refined",) if config.refine else ()))


def list_memories(config: TableConfig) -> list[Memories]:
    """The memories of all cells."""
    found = []
    for way in WAYS if config.only == "all" else [config.only]:
        for c in config.classes:
            # One class without replacement: both ways of counting are the same; with, it shows the artefact.
            if (way == "images in all" and c == 1) or (way.endswith("replacement") and c != 1):
                continue
            found += [Memories(way, c, shots) for shots in config.shots]
    return found


def score(
    subject: Subject, nested: NestedEpisodes, config: TableConfig, memories: Memories
) -> dict[str, list[dict[str, Any]]]:
    """NLL under one kind of memories, nats per image; the figures from few samples serve both kinds of address."""
    way, classes, shots = memories
    targets = partial(nested.episodes, classes, shots)
    if way != "shots per class":
        targets = partial(nested.pooled, classes, shots, replacement=way.endswith("replacement"))
    (pair, device), samples, rows = (subject.pair, subject.device), config.samples, []
    cheap = protocols.nll_of_each(pair, targets(), samples.few, device=device)
    for how in memories.kinds(config):
        corrected = targets(first=samples.corrected)
        address: Literal["sampled", "exact"] = "exact" if how == "exact" else "sampled"
        refine = config.refine if how == "refined" else 0
        options: dict[str, Any] = {"address": address, "refine": refine}
        costly = protocols.nll_of_each(pair, corrected, samples.many, device=device, **options)
        found = TwoPhase(cheap, costly)
        figures = {"nll": found.estimate()._asdict(), "gain": found.gain()._asdict()}
        rows.append({"counting": way, "classes": classes, "shots": shots, "address": how, **figures})
    return {"rows": rows}


def main(config: TableConfig) -> None:
    """Score every cell, and write."""
    start = time.monotonic()
    config = config.resolved()
    subject = load_subject(config)
    nested = NestedEpisodes(subject.test, images=config.images, seed=config.seed)
    folder.begin(config, load=config.load, files=[pretrained.file_of(config.load)])
    with config.arithmetic(subject.device):
        found = kept.each(config, list_memories(config), partial(score, subject, nested, config), unit="memory")
    rows = [row for cell in found for row in cell["rows"]]
    head = results.header(config, since=start, device=subject.device, training={"model": subject.facts})
    write({**head, "rows": rows}, config)


def write(content: dict[str, Any], config: TableConfig) -> None:
    """Write results.json, report.md and the picture."""
    number = content["rows"][0]["nll"]["n"]
    parts = [
        f"{config.samples.about(number)} The same images in every cell; seed {config.seed}. With the address "
        f"summed exactly, {config.samples.many} is the number of decoder evaluations. For comparison, a "
        f"variational autoencoder without memory, on GMN's networks: {published.MEMORYLESS_NLL} nats."
    ]
    kinds = {
        "sampled": "address sampled",
        "exact": "address exact",
        "refined": f"address sampled, q(z | x, m) refined by {config.refine} steps for each image",
    }
    for way, about in WAYS.items():
        for kind, named in kinds.items():
            own = [r for r in content["rows"] if r["counting"] == way and r["address"] == kind]
            if own:
                parts += [f"## {way[0].upper()}{way[1:]}, {named}", f"{about}."]
                parts.append(grid(own, config, way))
    picture = f"{config.out.name}.png"
    by_shots = results.Picture(picture, "NLL by shots", lambda path: draw(path, content["rows"], config))
    results.write(config.out, content, "Table 1", [*parts, by_shots])


def grid(rows: list[dict[str, Any]], config: TableConfig, way: str) -> str:
    """Classes by shots, ours and the published ones."""
    values = {(r["classes"], r["shots"]): Mean.read(r["nll"]) for r in rows}
    lines = [
        [f"ours, C = {c}", *(str(values[c, s]) for s in config.shots)]
        for c in dict.fromkeys(r["classes"] for r in rows)
    ]
    for name, figures in others(way).items():
        for c, row in figures.items():
            by_shots = dict(zip(published.SHOTS, row, strict=True))
            again = " (recalled)" if (name, c) in published.RECALLED else ""
            lines.append([f"{name}, C = {c}{again}", *(str(by_shots.get(s, "")) for s in config.shots)])
    return table(["", *(results.plural(shots, "shot") for shots in config.shots)], lines)


def others(way: str) -> Mapping[str, Mapping[int, tuple[float, ...]]]:
    """Published figures for a way of counting."""
    found: dict[str, Mapping[str, Mapping[int, tuple[float, ...]]]] = {
        "shots per class": {"VMA": published.VMA_NLL},
        "images in all": {"re-implementation, 26 x 26": published.REIMPLEMENTATION_NLL},
        "images in all, with replacement": {"GMN": published.GMN_NLL},
    }
    return found[way]


def draw(path: Path, rows: list[dict[str, Any]], config: TableConfig) -> None:
    """NLL against shots: ours, and the paper's."""
    lines = {}
    # Those that the paper has come first, in its order: solid and dashed lines share their colours in order.
    for c in sorted(config.classes, key=lambda c: (c not in published.VMA_NLL, c)):
        own = [r for r in rows if (r["counting"], r["address"], r["classes"]) == ("shots per class", "sampled", c)]
        lines[f"ours, C = {c}"] = [(r["shots"], r["nll"]["mean"], r["nll"]["se"]) for r in own]
    for c, figures in published.VMA_NLL.items():
        lines[f"VMA, C = {c}"] = [(s, v, None) for s, v in zip(published.SHOTS, figures, strict=True)]
    plots.save_lines(path, lines, x="shots per class", y="NLL, nats per image", log=True, dashed="VMA")


if __name__ == "__main__":
    cli.run(main, TableConfig, __doc__)
