"""Few-shot classification without fine-tuning: the class of the entries that a lookup chooses.

From q(a | x, M) alone, and from the likelihood of every entry (the posterior that q approximates); among classes
of all test alphabets, and within one alphabet, which is harder. The soft-attention model, if one is given, by the
weights of its read. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import folder, kept, plots, protocols, results
from common.subject import Subject, TestConfig, load_subject
from common.train import loaded_facts
from paper import published
from vma_pyro import cli, models, pretrained
from vma_pyro._system.markdown import table
from vma_pyro.data import NestedEpisodes
from vma_pyro.evaluation import Mean


@dataclass(frozen=True)
class ClassificationConfig(TestConfig):
    """Classify images of unseen classes by the memory's labels."""

    out: Path = Path("runs/classification")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    soft: Path | None = None
    """Checkpoint of a soft-attention model to classify with as well."""
    ways: tuple[int, ...] = (5, 16, 20)
    """Classes in the memory."""
    shots: tuple[int, ...] = (1, 5)
    """Examples of each class in the memory."""
    images: int = 3000
    """Targets by q(a | x) and by attention."""
    likelihood_images: int = 500
    """Targets by the likelihoods of the entries, the first of the same."""
    draws: int = 10
    """Samples of z for each entry's likelihood, and for the weights of a soft read."""

    def resolved(self) -> ClassificationConfig:
        """Fill in the tiny sizes, if they are wanted."""
        small: dict[str, Any] = {"ways": (2, 3), "shots": (1,), "images": 6, "likelihood_images": 4, "draws": 2}
        return replace(self, **small) if self.tiny else self


class Task(NamedTuple):
    """What is classified, and how."""

    by: str
    among: str
    ways: int
    shots: int


def list_tasks(config: ClassificationConfig) -> list[Task]:
    """All tasks, each by every means that there is a model for."""
    means = ["guide", "likelihood", *(["attention"] if config.soft is not None else [])]
    return [
        Task(by, among, ways, shots)
        for by in means
        for among in ("all alphabets", "one alphabet")
        for ways in config.ways
        for shots in config.shots
    ]


def nested_episodes(subject: Subject, config: ClassificationConfig, task: Task) -> NestedEpisodes:
    """The targets of a task, the same for all numbers of classes and examples."""
    within = task.among == "one alphabet"
    return NestedEpisodes(
        subject.test,
        images=config.images,
        seed=config.seed,
        within_alphabet=within,
        smallest_alphabet=max(config.ways) if within else 1,
    )


def score(subject: Subject, soft: models.Pair | None, config: ClassificationConfig, task: Task) -> dict[str, Any]:
    """Share of targets classified right."""
    nested = nested_episodes(subject, config, task)
    pair = soft if task.by == "attention" else subject.pair
    assert pair is not None  # tasks come from the configuration
    how: Any = task.by
    first = config.likelihood_images if task.by == "likelihood" else None
    episodes = nested.episodes(task.ways, task.shots, first=first)
    found = protocols.accuracy(pair, episodes, device=subject.device, by=how, num_samples=config.draws)
    return {**task._asdict(), "accuracy": found._asdict()}


def main(config: ClassificationConfig) -> None:
    """Score every task, and write."""
    start = time.monotonic()
    config = config.resolved()
    soft = None if config.soft is None else models.load(config.soft, program=("soft", "soft-guided"))
    subject = load_subject(config)
    training = {"hard": subject.facts}
    if config.soft is not None and soft is not None:
        soft = models.on(subject.device, soft)
        training["soft"] = loaded_facts(config.soft)
    largest = max(Counter(subject.test.groups).values())
    if max(config.ways) > largest:
        raise ValueError(
            f"ways: expected at most {largest}, the classes of the largest alphabet, got {config.ways}"
        )
    files = [pretrained.file_of(path) for path in (config.load, config.soft) if path is not None]
    folder.begin(config, load=config.load, files=files)
    with config.arithmetic(subject.device):
        rows = kept.each(config, list_tasks(config), partial(score, subject, soft, config), unit="task")
    head = results.header(config, since=start, device=subject.device, training=training)
    write({**head, "rows": rows}, config)


NAMES = {
    "guide": "q(a|x)",
    "likelihood": "likelihood of every entry",
    "attention": "weights of soft attention",
}


def write(content: dict[str, Any], config: ClassificationConfig) -> None:
    """Write results.json, report.md and the picture."""
    columns = [(ways, shots) for ways in config.ways for shots in config.shots]
    found = {(r["by"], r["among"], r["ways"], r["shots"]): Mean.read(r["accuracy"]) for r in content["rows"]}
    lines = [
        [NAMES[by], among, *(results.percent(found[by, among, ways, shots]) for ways, shots in columns)]
        for by, among in dict.fromkeys((r["by"], r["among"]) for r in content["rows"])
    ]
    paper = [f"{100 * published.VMA_ACCURACY[c]:.0f}" if c in published.VMA_ACCURACY else "" for c in columns]
    lines.append(["VMA (Bornschein et al. 2017), recalled", "all alphabets", *paper])
    about = (
        "Correct, %, mean ± standard error over the same targets in every column, each with a memory of its "
        f"own that does not hold it; classes that training never saw; seed {config.seed}. By q(a|x) and by "
        f"attention at most {config.images} targets, by likelihood the first {config.likelihood_images}, with "
        f"{config.draws} samples of z for every entry. Within one alphabet all classes are of the target's "
        "alphabet."
    )
    head = ["by", "among", *(f"{ways}-way {shots}-shot" for ways, shots in columns)]
    picture = f"{config.out.name}.png"
    curves = {
        f"{among}: {NAMES[by]}, {shots}-shot": [
            (ways, 100 * found[by, among, ways, shots].mean, 100 * found[by, among, ways, shots].se)
            for ways in config.ways
        ]
        for by, among in dict.fromkeys((r["by"], r["among"]) for r in content["rows"])
        for shots in config.shots
    }
    axes = {"x": "classes", "y": "correct, %", "dashed": "one alphabet"}
    by_classes = results.Picture(
        picture,
        "Accuracy by number of classes",
        lambda path: plots.save_lines(path, curves, **axes),  # type: ignore[arg-type]
    )
    parts: list[str | results.Picture] = [about, table(head, lines), by_classes]
    results.write(config.out, content, "Few-shot classification, no fine-tuning", parts)


if __name__ == "__main__":
    cli.run(main, ClassificationConfig, __doc__)
