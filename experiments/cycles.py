"""What training made of which networks: every cycle that was tried, the ones that gained nothing among them.

Takes finished (or stopped) runs of `few_shot.py` into `experiments/results/models.json`, and writes the page. Only
validation alphabets are looked at. A cycle goes on from the weights that it names; what changed with it stands in
its row.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import plots, results
from vma_pyro import cli, models
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro._system.command import command
from vma_pyro._system.markdown import table
from vma_pyro._system.metrics import read_metrics

RESULTS = Path(__file__).resolve().parent / "results"
# What tells one cycle from another.
OPTIONS = (
    "likelihood",
    "width",
    "top_maps",
    "blocks",
    "refinement",
    "looks",
    "key_maps",
    "context_radius",
    "context_hidden",
    "context_layers",
    "context_steps",
    "context_alone",
    "augment",
    "blank",
    "queries",
    "particles",
    "estimator",
    "optimizer",
    "learning_rate",
    "precision",
    "train_only",
)
LAST = 20  # lines of metrics behind KL(a) and KL(z)


@dataclass(frozen=True)
class ModelsConfig:
    """Collect cycles of training."""

    add: tuple[Path, ...] = ()
    """Folders of runs of few_shot.py, each under its own name."""
    note: str = ""
    """What is to be said of those that are added."""
    out: Path = RESULTS / "models"
    """The page and its figures, without suffix."""
    tiny: bool = False
    """No effect; the tests run every experiment with it."""


def read_cycle(folder: Path, note: str) -> dict[str, Any]:
    """One cycle, of a run's folder.

    Raises:
        FileNotFoundError: no run in it.
        ValueError: a run without validation.
    """
    facts, lines = models.facts_of(folder / "checkpoint.pt"), read_metrics(folder / "metrics.jsonl")
    validation = [
        (line["update"], line["seconds"], line["validation_nll"]) for line in lines if "validation_nll" in line
    ]
    if not validation:
        raise ValueError(f"add: expected a run with validations, got none in {folder}")
    training = [line for line in lines if "kl_address" in line][-LAST:]
    means = {name: sum(line[name] for line in training) / max(1, len(training)) for name in ("kl_address", "kl_z")}
    return {
        "name": folder.name,
        "note": note,
        "data": facts.get("data"),
        "init": facts.get("init"),
        "options": {name: facts[name] for name in OPTIONS if facts.get(name) not in (None, 0, "all")},
        "minutes": round(validation[-1][1] / 60, 1),
        "updates": validation[-1][0],
        "finished": bool(facts.get("finished")),
        "validation": validation,
        **means,
    }


def page(content: dict[str, Any], out: Path) -> None:
    """Write the page, and the picture of all curves by likelihood."""
    cycles = content["cycles"]
    parts: list[str | results.Picture] = [
        "Validation NLL in nats per image: an upper bound from 8 importance samples on memories of the training's "
        "size, of alphabets that training never saw; the images are the same where queries are. Minutes of one "
        "core, with whatever else the machine was doing. KL(a) and KL(z): of the last training episodes, blank "
        "memories among them. Figures of the two likelihoods are not to be compared."
    ]
    kinds = list(dict.fromkeys(cycle["options"].get("likelihood", "bernoulli") for cycle in cycles))
    head = ["cycle", "from", "what", "minutes", "updates", "before", "best", "end", "KL(a)", "KL(z)"]
    for kind in kinds:
        own = [cycle for cycle in cycles if cycle["options"].get("likelihood", "bernoulli") == kind]
        parts += [f"## Likelihood: {kind}", table(head, [row(cycle) for cycle in own])]
        # Validation images are as many as queries: only curves of the same number are of the same images.
        queries = [c["options"].get("queries") for c in own]
        same = [c for c in own if c["options"].get("queries") == max(queries, key=queries.count)]
        curves = {c["name"]: [(s / 60, nll, None) for _, s, nll in c["validation"]] for c in same}
        parts.append(
            results.Picture(
                f"{out.name}_{kind}.png",
                f"Validation NLL against minutes, {kind}, of cycles with the same validation images",
                lambda path, curves=curves: plots.save_lines(  # type: ignore[misc]  # the loop's own
                    path, curves, x="minutes", y="validation NLL, nats per image"
                ),
            )
        )
    files = out.with_suffix(".json"), out.with_suffix(".md")
    results.write_as(files, content, "Networks and cycles of training", parts)


def row(cycle: dict[str, Any]) -> list[str]:
    """One row of the table."""
    values = [nll for _, _, nll in cycle["validation"]]
    before = values[0] if cycle["validation"][0][0] == 0 else None
    said = ", ".join(f"{name} {value}" for name, value in cycle["options"].items() if name != "likelihood")
    figures = [f"{value:.2f}" for value in (min(values), values[-1], cycle["kl_address"], cycle["kl_z"])]
    stopped = "" if cycle["finished"] else " (stopped)"
    return [
        cycle["name"] + stopped,
        Path(str(cycle["init"] or "nothing")).parent.name or str(cycle["init"] or "nothing"),
        f"{cycle['note']}: {said}" if cycle["note"] else said,
        f"{cycle['minutes']:g}",
        f"{cycle['updates']:,}",
        "" if before is None else f"{before:.2f}",
        *figures,
    ]


def main(config: ModelsConfig) -> None:
    """Take cycles over, and write."""
    lock.take(config.out.parent, argument="out")
    path = config.out.with_suffix(".json")
    known = json.loads(path.read_text())["cycles"] if path.exists() else []
    found = {cycle["name"]: cycle for cycle in known}
    for folder in config.add:
        found[folder.name] = read_cycle(folder, config.note)
    if not found:
        raise ValueError(f"add: expected folders of runs, as there are none yet in {path}, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command(), "cycles": list(found.values())}
    write_text(path, results.to_json(content))
    page(content, config.out)


if __name__ == "__main__":
    cli.run(main, ModelsConfig, __doc__)
