"""How a model trained with tens of entries does with thousands (figure 5 of the paper): NLL by size of the memory.

One trained model, test memories from one class to all of them. If a lookup finds the right class among C, the
bound falls by log C and no more: the line L_1 + log C. Beside it the number of examples of each class, a model
without memory and soft attention, if they are given. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from common import folder, kept, plots, protocols, results
from common.protocols import TINY
from common.subject import TestConfig, load_subject
from common.train import loaded_facts
from vma_pyro import cli, models, pretrained
from vma_pyro._system.markdown import table
from vma_pyro.data import ImageClasses, NestedEpisodes, omniglot
from vma_pyro.evaluation import Mean, TwoPhase


@dataclass(frozen=True)
class SizeConfig(TestConfig):
    """Score a trained model with memories of every size."""

    out: Path = Path("runs/memory_size")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    soft: Path | None = None
    """Checkpoint of a soft-attention model to compare with."""
    memoryless: Path | None = None
    """Checkpoint of a model without memory to compare with."""
    also: tuple[Path, ...] = ()
    """Checkpoints of further models for the second picture, each called as its folder; those of `kl_split.py`,
    trained with 1, 2, 4, 8 and 16 examples, are in models/1_examples/model.pt and so on."""
    classes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 144)
    """Classes in the memory, of the 144 in the paper's five test alphabets."""
    shots: tuple[int, ...] = (1, 4, 19)
    """Examples of each of them."""
    all_classes: tuple[int, ...] = (1, 8, 132, 659)
    """Classes in the memory, of all test classes."""
    all_shots: int = 19
    """Examples of each of those: all of them but the target."""
    examples: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 12, 16, 19)
    """Examples of one class, for the second picture."""
    images: int = 500
    """Test images, the same in all memories."""

    def resolved(self) -> SizeConfig:
        """Fill in the tiny sizes, if they are wanted."""
        small: dict[str, Any] = {"classes": (1, 2), "shots": (1, 2), "examples": (1, 2), "all_shots": 2}
        return replace(self, **small, all_classes=(1, 3), images=4, samples=TINY) if self.tiny else self


class Cell(NamedTuple):
    """One memory size for one model."""

    model: str
    test: str
    classes: int
    shots: int


def list_cells(config: SizeConfig, models: Collection[str], tests: Mapping[str, ImageClasses]) -> list[Cell]:
    """All sizes for all models, each once; those that the test classes do not have are left out."""
    first = next(iter(tests))
    sizes = [(first, c, s) for s in config.shots for c in config.classes]
    sizes += [(first, 1, s) for s in config.examples]
    sizes += [("all alphabets", c, config.all_shots) for c in config.all_classes]
    found = [Cell("hard", *size) for size in dict.fromkeys(sizes)]
    found += [Cell(path.parent.name, first, 1, s) for path in config.also for s in config.examples]
    if "soft" in models:
        found += [Cell("soft", first, c, s) for s in config.shots[:2] for c in config.classes]
    if "memoryless" in models:
        found.append(Cell("memoryless", first, 1, 1))
    return [c for c in found if c.classes <= len(tests[c.test]) and c.shots < tests[c.test].examples]


def load_others(config: SizeConfig) -> dict[str, tuple[Path, models.Pair]]:
    """The models to compare with, by name, and their files."""
    wanted: list[tuple[str, Path | None, Any]] = [
        ("soft", config.soft, ("soft", "soft-guided")),
        ("memoryless", config.memoryless, "memoryless"),
        *((path.parent.name, path, "memory") for path in config.also),
    ]
    names = ["hard", *(name for name, path, _ in wanted if path is not None)]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"also: expected checkpoints in folders of different names, got {', '.join(names)}")
    return {name: (path, models.load(path, program=kind)) for name, path, kind in wanted if path is not None}


def score(
    pairs: Mapping[str, models.Pair],
    nested: Mapping[str, NestedEpisodes],
    config: SizeConfig,
    device: torch.device,
    cell: Cell,
) -> dict[str, Any]:
    """NLL of every target, nats: with few samples, and of the first of them with many."""
    targets = partial(nested[cell.test].episodes, cell.classes, cell.shots)
    found = protocols.nll(pairs[cell.model], targets, config.samples, device=device)
    return {**cell._asdict(), **found.plain()}


def main(config: SizeConfig) -> None:
    """Score every size, and write."""
    start = time.monotonic()
    config = config.resolved()
    others = load_others(config)
    subject = load_subject(config)
    pairs = {"hard": subject.pair}
    training = {"hard": subject.facts}
    for name, (path, pair) in others.items():
        pairs[name] = models.on(subject.device, pair)
        training[name] = loaded_facts(path)
    tests = {"all alphabets": subject.test}
    if set(omniglot.TEST_5) <= set(subject.test.groups):
        tests = {"five alphabets": subject.test.of_groups(omniglot.TEST_5), **tests}
    nested = {n: NestedEpisodes(c, images=config.images, seed=config.seed) for n, c in tests.items()}
    files = [pretrained.file_of(path) for path in (config.load, *(path for path, _ in others.values()))]
    folder.begin(config, load=config.load, files=files)
    todo = partial(score, pairs, nested, config, subject.device)
    with config.arithmetic(subject.device):
        found = kept.each(config, list_cells(config, pairs, tests), todo, unit="size")
    head = results.header(config, since=start, device=subject.device, training=training)
    write({**head, "rows": sum_up(found)}, config)


def sum_up(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each size's NLL, and its excess over L_1 + log C, paired by target with the memory of one class."""
    scores = {Cell(*(f[k] for k in Cell._fields)): TwoPhase.read(f) for f in found}
    rows = []
    for cell, score_ in scores.items():
        row = {**cell._asdict(), "entries": cell.classes * cell.shots, "nll": score_.estimate()._asdict()}
        one = scores.get(cell._replace(classes=1))
        if one is not None:
            more = score_.minus(one).estimate()
            row["excess"] = more._replace(mean=more.mean - math.log(cell.classes))._asdict()
        rows.append(row)
    return rows


def write(content: dict[str, Any], config: SizeConfig) -> None:
    """Write results.json, report.md and the picture."""
    about = (
        f"{config.samples.about(content['rows'][0]['nll']['n'])} The same images in all memories of the "
        f"same classes; seed {config.seed}. Excess: over L_1 + log C, the NLL with the target's class alone plus "
        "the cost of naming one class of C, paired by image; 0 or less is what perfect lookups would give."
    )
    lines = [
        [
            row["model"],
            row["test"],
            row["classes"],
            row["shots"],
            f"{row['entries']:,}" if row["model"] != "memoryless" else "none",
            Mean.read(row["nll"]),
            Mean.read(row["excess"]) if "excess" in row and row["classes"] > 1 else "",
        ]
        for row in content["rows"]
    ]
    head = ["model", "test classes", "C", "examples of each", "entries", "NLL", "excess over L_1 + log C"]
    picture = f"{config.out.name}.png"
    by_size = results.Picture(
        picture, "NLL by size of the memory", lambda path: draw(path, content["rows"], config)
    )
    parts: list[str | results.Picture] = [about, table(head, lines), by_size]
    results.write(config.out, content, "The size of the test memory", parts)


def draw(path: Path, rows: Sequence[dict[str, Any]], config: SizeConfig) -> None:
    """NLL against classes with L_1 + log C, and against the examples of one class."""

    def points(x: str, **wanted: Any) -> list[tuple[float, float, float | None]]:
        own = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
        return sorted((r[x], r["nll"]["mean"], r["nll"]["se"]) for r in own)

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for test, shots in dict.fromkeys(
        (r["test"], r["shots"]) for r in rows if r["model"] == "hard" and r["classes"] > 1
    ):
        own = points("classes", model="hard", test=test, shots=shots)
        curves[f"{test}, {shots} of each class"] = own
        curves[f"L_1 + log C, {test}, {shots}"] = [(c, own[0][1] + math.log(c), None) for c, *_ in own]
    for shots in dict.fromkeys(r["shots"] for r in rows if r["model"] == "soft"):
        curves[f"soft attention, {shots} of each class"] = points("classes", model="soft", shots=shots)
    plots.draw_lines(left, curves, x="classes in memory", y="NLL, nats per image", log=True, dashed="L_1")
    one = {"the model": points("shots", model="hard", test=rows[0]["test"], classes=1)}
    for name in (file.parent.name for file in config.also):
        one[name] = points("shots", model=name, classes=1)
    without = [r["nll"]["mean"] for r in rows if r["model"] == "memoryless"]
    if without:
        one["no memory"] = [(1, without[0], None), (max(config.examples), without[0], None)]
    plots.draw_lines(
        right, one, x="examples of the one class in memory", y="NLL, nats per image", dashed="no memory"
    )
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main, SizeConfig, __doc__)
