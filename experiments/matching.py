"""One-shot classification of all images of an episode at once: 20 classes, an example and a target of each.

A task of its own, whose figures never stand beside those of one image at a time (`classification.py`): whoever
knows that targets and classes match one to one may use it. Here every rule is tried with and without that, on
validation alphabets, which choose, and on test alphabets. Scores: q(a | x); the likelihood of x given each
example; and both directions, where the example must also be better explained by x than by nothing. Writes
results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import folder, kept, plots, results
from common.subject import Subject, TestConfig, load_subject
from common.train import loaded_facts
from vma_pyro import cli, models, pretrained
from vma_pyro._system.markdown import table
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.data import ImageClasses, MatchingEpisodes, split_of
from vma_pyro.evaluation import Mean, assign, match_scores

RULES = {"guide": "q(a\\|x)", "likelihood": "p(x\\|m)", "both_ways": "p(x\\|m) p(m\\|x) / p(m)"}


@dataclass(frozen=True)
class MatchingConfig(TestConfig):
    """Classify all images of an episode at once."""

    out: Path = Path("runs/matching")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    memoryless: Path | None = None
    """Checkpoint of a memoryless model of the same likelihood for p(m); by default the model itself with a blank
    entry in memory, as it is when trained with `--blank`."""
    ways: int = 20
    """Classes of an episode, and targets."""
    number: int = 100
    """Episodes of each kind."""
    draws: int = 10
    """Samples of z for each pair of a target and an example."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        super().__post_init__()
        cli.check_sizes(self, "number")

    def resolved(self) -> MatchingConfig:
        """Fill in the tiny sizes, if they are wanted."""
        return replace(self, ways=2, number=2, draws=2) if self.tiny else self


class Kind(NamedTuple):
    """Where episodes are from."""

    split: str
    among: str


KINDS = [Kind(split, among) for split in ("validation", "test") for among in ("one alphabet", "all alphabets")]


def score(
    subject: Subject,
    memoryless: models.Pair,
    classes: dict[str, ImageClasses],
    config: MatchingConfig,
    kind: Kind,
) -> dict[str, Any]:
    """Share of right targets by each rule; the standard error is over episodes, whose targets go together."""
    within = kind.among == "one alphabet"
    episodes = MatchingEpisodes(
        classes[kind.split], number=config.number, seed=config.seed, within_alphabet=within
    )
    shares: dict[tuple[str, str], list[float]] = {}
    for number, episode in enumerate(episodes.episodes(config.ways, 1)):
        e = episode.to(subject.device)
        options: dict[str, Any] = {"num_samples": config.draws, "seed": number}
        found = match_scores(*subject.pair, e.memory, e.x, memoryless=memoryless, **options)
        for rule, scores in found._asdict().items():
            for way, classified in (("alone", scores.argmax(1)), ("one to one", assign(scores))):
                shares.setdefault((rule, way), []).append((classified == e.labels).double().mean().item())
    rows = [
        {"rule": rule, "way": way, "accuracy": Mean.of(torch.tensor(each))._asdict()}
        for (rule, way), each in shares.items()
    ]
    return {"rows": [{**kind._asdict(), **row} for row in rows]}


def main(config: MatchingConfig) -> None:
    """Score every rule on every kind of episodes, and write."""
    start = time.monotonic()
    config = config.resolved()
    subject = load_subject(config)
    training = {"model": subject.facts}
    networks: Any = subject.pair[0].networks
    likelihood: Any = subject.pair[0]._modules["likelihood"]
    memoryless: models.Pair = MemorylessModel(networks, likelihood=likelihood), MemorylessGuide(networks)
    if config.memoryless is not None:
        memoryless = models.on(subject.device, models.load(config.memoryless, program="memoryless"))
        training["memoryless"] = loaded_facts(config.memoryless)
        kinds = [models.likelihood_of(pair[0]) for pair in (subject.pair, memoryless)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"memoryless: expected a model with the likelihood {kinds[0]}, got {kinds[1]}")
    split = split_of(subject.facts, config.data_dir)
    classes = {"validation": split.validation, "test": split.test}
    files = [pretrained.file_of(path) for path in (config.load, config.memoryless) if path is not None]
    folder.begin(config, load=config.load, files=files)
    with config.arithmetic(subject.device):
        cells = kept.each(config, KINDS, partial(score, subject, memoryless, classes, config), unit="kind")
    head = results.header(config, since=start, device=subject.device, training=training)
    write({**head, "rows": [row for cell in cells for row in cell["rows"]]}, config)


def write(content: dict[str, Any], config: MatchingConfig) -> None:
    """Write results.json, report.md and the picture."""
    found = {(r["rule"], r["way"], r["split"], r["among"]): Mean.read(r["accuracy"]) for r in content["rows"]}
    rules = list(dict.fromkeys((r["rule"], r["way"]) for r in content["rows"]))
    chosen = {
        (way, among): max(
            (rule for rule, w in rules if w == way), key=lambda r: found[r, way, "validation", among].mean
        )
        for way in ("alone", "one to one")
        for among in ("one alphabet", "all alphabets")
    }
    lines = []
    for rule, way in rules:
        cells = []
        for split, among in KINDS:
            mark = " *" if split == "test" and chosen[way, among] == rule else ""
            cells.append(results.percent(found[rule, way, split, among]) + mark)
        lines.append([RULES[rule], way, *cells])
    about = (
        f"Correct, %, {config.ways}-way 1-shot, mean ± standard error over {config.number} episodes of "
        f"{config.ways} targets, one of each class; seed {config.seed}; {config.draws} samples of z for each "
        "pair. Alone: each target gets its best class. One to one: the assignment with the largest sum of scores. "
        "*: the rule that is best on validation alphabets, for the test figure to go by. p(m): "
        + ("the model with a blank entry." if config.memoryless is None else "the memoryless model.")
    )
    head = ["score", "targets", *(f"{split}, {among}" for split, among in KINDS)]
    curves = {
        f"{RULES[rule].replace(chr(92), '')}, {way}": [
            (i, 100 * found[rule, way, *kind].mean, 100 * found[rule, way, *kind].se)
            for i, kind in enumerate(KINDS)
        ]
        for rule, way in rules
    }
    picture = results.Picture(
        f"{config.out.name}.png",
        "Share of right targets by rule",
        lambda path: plots.save_lines(
            path, curves, x="; ".join(f"{i}: {', '.join(kind)}" for i, kind in enumerate(KINDS)), y="correct, %"
        ),
    )
    parts: list[str | results.Picture] = [about, table(head, lines), picture]
    results.write(config.out, content, "One-shot classification of all images at once", parts)


if __name__ == "__main__":
    cli.run(main, MatchingConfig, __doc__)
