"""The few-shot scores as JSON for programs and as Markdown for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import results
from main_job.scores import Amounts, FewShotScores
from vma_pyro._system.markdown import table
from vma_pyro.evaluation import Mean
from vma_pyro.models import updates_of


class About(NamedTuple):
    """Says what was run, and how.

    Attributes:
        command: with which everything can be repeated.
        data: name of the data set.
        seconds: of the whole job, wall clock; of its last session if it was interrupted.
        device: on which it ran.
        seed: of training.
        training: name of a model to facts about its training (updates, seconds, ...).
        config: all options.
        amounts: how much was measured.
        no_gain: why the model without memory may not be subtracted; empty if it may.
        pictures: names to why they are not drawn; empty if they are.
        likelihood: name of p(x | z, m).
        dimensions: numbers of an image of 8 bits, of which bits are said; None of others.
    """

    command: str
    data: str
    seconds: float
    device: torch.device
    seed: int
    training: dict[str, dict[str, Any]]
    config: dict[str, Any]
    amounts: Amounts
    no_gain: str = ""
    pictures: Mapping[str, str] = MappingProxyType({})
    likelihood: str = "bernoulli"
    dimensions: int | None = None


SHOWN = {
    "samples.png": " (generated from one example: draws of x, and E[x | z, m])",
    "posterior.png": " (the address posterior)",
}


def to_json(about: About, scores: FewShotScores, memoryless: Tensor | None) -> str:
    """List every figure with its standard error and number of images; NLL in nats per image, accuracy as a share.

    Args:
        about: what was run.
        scores: of the memory model.
        memoryless: NLL of the same images without memory [images], if measured.
    """
    kl = {name: _plain(value) for name, value in scores.kl._asdict().items() if name != "nll_of_images"}
    content = {
        "command": about.command,
        "likelihood": about.likelihood,
        "bits_per_dim": {shots: bits(about, estimate)._asdict() for shots, estimate in scores.nll.items()}
        if about.dimensions
        else None,
        "seconds": about.seconds,
        "nll": {shots: _plain(estimate) for shots, estimate in scores.nll.items()},
        "nll_memoryless": None if memoryless is None else Mean.of(memoryless)._asdict(),
        "nll_gain": {shots: gain._asdict() for shots, gain in gains(about, scores, memoryless).items()},
        "no_gain": about.no_gain or None,
        "accuracy": {task: _plain(estimate) for task, estimate in scores.accuracy.items()},
        "kl": kl | {"mutual_information": _plain(scores.mutual_information)},
        "training": about.training,
        "protocol": about.amounts._asdict() | dict(zip(("classes", "shots"), scores.split_memory, strict=True)),
        "config": about.config,
        "versions": results.versions(about.device),
    }
    return results.to_json(content)


def tested(estimates: Mapping[str, Mean]) -> int:
    """Count the images of estimates over the same ones."""
    return next((estimate.n for estimate in estimates.values()), 0)


def to_markdown(about: About, scores: FewShotScores, memoryless: Tensor | None) -> str:
    """Write the report: likelihood by number of examples, classification, and where the nats go."""
    amounts, kl = about.amounts, scores.kl
    likelihoods: list[tuple[str, Any]] = [
        (f"{shots} in memory", estimate) for shots, estimate in scores.nll.items()
    ]
    if memoryless is not None:
        likelihoods.append(("no memory (the same networks)", Mean.of(memoryless)))
        paired = gains(about, scores, memoryless).items()
        likelihoods += [(f"gain of {shots} in memory over none, paired by image", gain) for shots, gain in paired]
    if memoryless is not None and about.no_gain:
        likelihoods.append(("gain over none", f"no figure; {about.no_gain}"))
    if about.dimensions:
        likelihoods += [
            (
                f"{shots} in memory, bits per dimension",
                f"{bits(about, estimate).mean:.3f} ± {bits(about, estimate).se:.3f}",
            )
            for shots, estimate in scores.nll.items()
        ]
    accuracies = [(task, results.percent(share)) for task, share in scores.accuracy.items()]
    split = [
        ("NLL", kl.nll),
        *kl.parts(),
        ("what the lookup costs, KL(a)", kl.kl_address),
        ("KL(a) in bits", kl.kl_address_bits),
        (f"KL(a) as a share of log|M| = {kl.log_memory:.2f}", kl.kl_address_share),
        ("mutual information of x and a, one shared memory", scores.mutual_information),
        ("perplexity of q(a|x), in entries", kl.perplexity),
        ("share of q(a|x) on entries of the right class", kl.right_class),
        (f"effective sample size, of {kl.samples}", kl.effective_samples),
        ("information gained by the memory", kl.information_gained or about.no_gain or "not measured"),
    ]
    trained = ", ".join(f"{name} model {how_long(facts)}" for name, facts in about.training.items())
    seeds = f"seed {amounts.seed} for the test episodes" + (f", {about.seed} for training" if trained else "")
    drawn = [f"`{name}`{SHOWN.get(name, '')}" for name, reason in about.pictures.items() if not reason]
    missing = [f"{name} is not drawn ({reason})." for name, reason in about.pictures.items() if reason]
    pictures = [f"Pictures: {', '.join(drawn)}.", *missing] if drawn else missing
    return f"""# Few-shot report: {about.data}, unseen classes

`{about.command}`

Trained: {trained or "elsewhere, loaded here"}. Whole job: {about.seconds:.0f} s. Estimates are means over test
images ± their standard error; {seeds}.

## Negative log-likelihood

Likelihood: {about.likelihood}. Upper bound from {amounts.samples} importance samples, nats per image,
{tested(scores.nll)} images; examples of the image's own class in memory (all others where there are fewer), the
image itself never.

{table(("examples", "NLL in nats"), likelihoods)}

## Classification by q(a|x), no fine-tuning

{tested(scores.accuracy)} images, each with a memory of its own.

{table(("task", "correct, %"), accuracies)}

## Where the nats go

{amounts.images} images, each with a memory of {split_memory(scores)}; nats per image unless said otherwise.
The reconstructions and the KLs of the sites add up to the NLL with a single sample.

{table(("part", "value"), split)}

{" ".join(pictures)}
"""


def split_memory(scores: FewShotScores) -> str:
    """Say how large the memory of the KL split is; classes with fewer examples have all of theirs in it."""
    classes, shots = scores.split_memory
    entries = round(math.exp(scores.kl.log_memory))
    fewer = "" if entries == classes * shots else f" at most, {entries} in all"
    return f"{classes} classes x {shots} examples{fewer}"


def bits(about: About, nll: Mean) -> Mean:
    """An NLL in bits per number of an image of 8 bits."""
    assert about.dimensions is not None
    factor = 1 / (about.dimensions * math.log(2))
    return Mean(nll.mean * factor, nll.se * factor, nll.n)


def how_long(facts: dict[str, Any]) -> str:
    """Count the updates of all cycles of training; say by what, and whether they ended before the budget did."""
    ways = [str(facts[name]) for name in ("optimizer", "precision") if name in facts]
    ways += ["networks compiled"] if facts.get("compiled") else []
    how = f" ({', '.join(ways)})" if ways else ""
    early = " (no better on validation, and stopped early)" if facts.get("stopped_early") else ""
    return f"{updates_of(facts)} updates{how}{early}"


def gains(about: About, scores: FewShotScores, memoryless: Tensor | None) -> dict[str, Mean]:
    """Number of shots to the memoryless NLL minus the NLL with memory, paired by image, in nats."""
    if memoryless is None or about.no_gain:
        return {}
    return {shots: Mean.of(memoryless - nll) for shots, nll in scores.nll_of_images.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value._asdict() if isinstance(value, Mean) else value
