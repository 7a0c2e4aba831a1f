"""The page of `likelihoods.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import plots, results
from paper import published
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Diversity, Mean

FIGURES = ("kl_z", "kl_address", "right_class")


def name_of(path: Path) -> str:
    """A model by the folder of its run."""
    return path.parent.name if path.name in ("model.pt", "checkpoint.pt") else path.stem


def write(content: dict[str, Any], config: Any, picture: Any) -> None:
    """Write results.json, report.md and the pictures."""
    rows = content["rows"]
    refined = [f"{shots}-shot" for shots in config.shots] if config.refine else []
    head = ["model", "likelihood", *(f"{shots}-shot" for shots in config.shots)]
    head += [f"{name}, refined" for name in refined]
    head += ["without", *(f"worth at {s}" for s in config.shots)] if config.without else []
    nats = []
    for row in rows:
        worth = row.get("worth", {})
        cells = [row["nll"][str(s)] for s in config.shots]
        cells += [row["refined"][str(s)] for s in config.shots] if config.refine else []
        cells += [row["nll"].get("0"), *(worth.get(str(s)) for s in config.shots)] if config.without else []
        nats.append([row["model"], row["likelihood"], *(str(Mean.read(c)) if c else "" for c in cells)])
    said = ["model", "KL(z)", "KL(a)", "right class, %", f"{config.ways}-way 1-shot, %", "class fidelity, %"]
    said += ["diversity relative to real"]
    others = []
    for row in rows:
        kl_z, kl_a, right = (Mean.read(row["split"][name]) for name in FIGURES)
        shares = (row["accuracy"], row["fidelity"]["generated"])
        percent = [results.percent(Mean.read(share)) for share in shares]
        others.append(
            [row["model"], str(kl_z), str(kl_a), results.percent(right), *percent, f"{relative(row):.2f}"]
        )
    joint = [f"{row['model']} {Mean.read(row['joint'])}" for row in rows if "joint" in row]
    parts: list[str | results.Picture] = [about_nll(config), table(head, nats)]
    if joint:
        parts.append(
            "Joint measure, the mean of the NLLs with 0 to 19 examples of the class in memory: "
            f"{', '.join(joint)}. (Variational Homoencoder, {published.VHE_JOINT}, recalled: most likely this "
            "mean.)"
        )
    parts += [about_samples(config, rows), table(said, others)]
    name = f"{config.out.name}.png"
    parts.append(results.Picture(name, "Draws of x by each model from the same entries", picture))
    real = f"real images, {100 * rows[0]['fidelity']['real']['mean']:.0f} %"
    points = {row["model"]: (relative(row), 100 * row["fidelity"]["generated"]["mean"]) for row in rows}
    points[real] = (1.0, 100 * rows[0]["fidelity"]["real"]["mean"])
    axes = {"x": "diversity relative to real images", "y": "class fidelity, %", "real": real}
    parts.append(
        results.Picture(
            f"{config.out.name}_samples.png",
            "Recognisability against diversity of samples from one example",
            lambda path: plots.save_points(path, points, **axes),
        )
    )
    results.write(config.out, content, "Likelihoods: what a memory is worth, and what samples are like", parts)


def relative(row: Mapping[str, Any]) -> float:
    """How much what a model generates varies, relative to real images."""
    return Diversity(*(Mean.read(row["diversity"][name]) for name in Diversity._fields)).relative


def about_nll(config: Any) -> str:
    """What the first table shows."""
    corrected = min(config.samples.corrected, config.images)
    refined = (
        f" Refined: with q(z | x, m) of each of the {corrected} images optimised by {config.refine} steps, which "
        "no other figure is to be compared with."
        if config.refine
        else ""
    )
    without = (
        " Without: a blank memory; worth: its NLL less that with examples, paired by image; empty where the model "
        "was not trained with blank memories, and too much where it was trained with few."
        if config.without
        else ""
    )
    return (
        f"{config.split.capitalize()} classes, {config.images} images, seed {config.seed}; NLL in nats per image, "
        f"mean ± standard error: an upper bound, one class in memory, {config.samples.many} importance samples "
        f"for {corrected} images and {config.samples.few} for all.{refined}{without} NLLs of different "
        "likelihoods are not to be compared: what a memory is worth under each is."
    )


def about_samples(config: Any, rows: Any) -> str:
    """What the second table shows."""
    real = Mean.read(rows[0]["fidelity"]["real"])
    return (
        "KL(z), KL(a), nats, and the share of q(a|x) on entries of the right class: memories of 8 classes x 4 "
        f"examples. Class fidelity: images generated from one example, one each, of which the guide of "
        f"{name_of(config.judge)} finds the class among {config.ways} with another example each; of the real "
        f"examples themselves {results.percent(real)} %. Diversity: root mean square distance of images generated "
        "from one example from their mean, in the embedding of that guide, relative to that of real images of the "
        f"class; {config.diverse} classes."
    )
