"""How a trained model is tested: likelihoods, accuracies and the split of the bound over streams of episodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vma_pyro import cli
from vma_pyro.data import Episode
from vma_pyro.evaluation import (
    Fidelity,
    Mean,
    TwoPhase,
    class_fidelity,
    classify,
    classify_by_attention,
    classify_by_likelihood,
    encoded,
    kl_report,
    log_likelihood,
)
from vma_pyro.models import Pair


class Targets(Protocol):
    """The same targets at every call, each under a memory of its own, as `NestedEpisodes.episodes` gives them."""

    def __call__(self, *, first: int | None = None) -> Iterator[Episode]:
        """All targets, or only the first so many."""


@dataclass(frozen=True)
class Samples:
    """How much goes into a likelihood: few samples for all targets, many for the first of them."""

    few: int = 10
    """Importance samples per target."""
    many: int = 1000
    """Importance samples per corrected target; what the figures are for."""
    corrected: int = 200
    """Targets that get many samples; the others' figures are corrected by the mean difference."""

    def __post_init__(self) -> None:
        """Refuse to measure nothing."""
        cli.check_sizes(self, "few", "many", "corrected")

    def about(self, images: int) -> str:
        """How the NLL of so many images is measured, for a report."""
        corrected = min(self.corrected, images)
        return (
            f"NLL: nats per image, an upper bound, over {images} test images of classes that training never saw, "
            f"each with a memory of its own that does not hold it; {self.few} importance samples for all images, "
            f"and {self.many} for {corrected} of them, by whose mean difference the mean of all is corrected; "
            "± is one standard error."
        )


TINY = Samples(few=2, many=3, corrected=2)

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots of the usual classification tasks


def nll(
    pair: Pair,
    targets: Targets,
    samples: Samples,
    *,
    device: torch.device,
    address: Literal["sampled", "exact"] = "sampled",
    refine: int = 0,
) -> TwoPhase:
    """Minus the importance-weighted bound of the targets, nats per image.

    Args:
        pair: model and guide.
        targets: the targets under their memories.
        samples: how many. With the address summed exactly, `many` is the number of decoder evaluations: as many
            samples of z for each address as fit into it, at least one.
        device: where model and guide live.
        address: of the corrected targets; see `log_likelihood`.
        refine: steps of refinement of the corrected targets; see `log_likelihood`.
    """
    cheap = nll_of_each(pair, targets(), samples.few, device=device)
    corrected = targets(first=samples.corrected)
    costly = nll_of_each(pair, corrected, samples.many, device=device, address=address, refine=refine)
    return TwoPhase(cheap, costly)


def nll_of_each(
    pair: Pair,
    episodes: Iterable[Episode],
    number: int,
    *,
    device: torch.device,
    address: Literal["sampled", "exact"] = "sampled",
    refine: int = 0,
) -> Tensor:
    """Minus the importance-weighted bound of every target, nats [N].

    Args:
        pair: model and guide.
        episodes: the targets under their memories.
        number: of importance samples, or of decoder evaluations with the address summed exactly.
        device: where model and guide live.
        address, refine: see `log_likelihood`.
    """
    bounds = []
    for episode in encoded(pair[1], episodes, device=device):
        e = episode.to(device)
        each = number if address == "sampled" else max(1, number // e.memory.size)
        bounds.append(log_likelihood(*pair, e.memory, e.x, num_samples=each, address=address, refine=refine))
    return -torch.cat(bounds).cpu()


def accuracy(
    pair: Pair,
    episodes: Iterable[Episode],
    *,
    device: torch.device,
    by: Literal["guide", "likelihood", "attention"] = "guide",
    num_samples: int = 10,
) -> Mean:
    """Share of targets whose most probable class is theirs.

    Args:
        pair: model and guide.
        episodes: the targets under their memories.
        device: where model and guide live.
        by: `classify`, `classify_by_likelihood` or `classify_by_attention`.
        num_samples: of z; for the guide none are needed.
    """
    model, guide = pair
    options: dict[str, Any] = {"num_samples": num_samples}
    right = []
    for episode in encoded(guide, episodes, device=device):
        e = episode.to(device)
        if by == "guide":
            probs = classify(guide, e.memory, e.x)
        elif by == "likelihood":
            probs = classify_by_likelihood(model, guide, e.memory, e.x, **options)
        else:
            probs = classify_by_attention(model, guide, e.memory, e.x, **options)
        right.append(probs.argmax(-1) == e.labels)
    return Mean.of(torch.cat(right))


def split(
    pair: Pair, episodes: Iterable[Episode], names: Sequence[str], *, num_samples: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Figures of `KLReport` over all targets, for JSON.

    Args:
        pair: model and guide.
        episodes: the targets under their memories.
        names: of the figures, estimates all.
        num_samples: importance samples per target.
        device: where model and guide live.
    """
    reports = []
    for episode in encoded(pair[1], episodes, device=device):
        e = episode.to(device)
        reports.append(kl_report(*pair, e.memory, e.x, labels=e.labels, num_samples=num_samples))
    return {name: Mean.pooled([getattr(report, name) for report in reports])._asdict() for name in names}


def fidelity(
    pair: Pair, judge: Any, episodes: Iterable[Episode], *, seed: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Class fidelity over all targets, for JSON: of images generated from each of them, and of themselves.

    Args:
        pair: model and guide.
        judge: a guide, the same for all models that are compared.
        episodes: the targets under memories among which the judge looks, with labels.
        seed: of what is generated.
        device: where model, guide and judge live.
    """
    parts = []
    for episode in episodes:
        e = episode.to(device)
        parts.append(class_fidelity(pair[0], judge, e.memory, e.x, e.labels, seed=seed))
    return {name: Mean.pooled([getattr(part, name) for part in parts])._asdict() for name in Fidelity._fields}


def first_of(episode: Episode, number: int) -> Episode:
    """The first so many targets of an episode with their memories."""
    part = slice(number)
    return Episode(episode.memory.datapoints(part), episode.x[part], episode.labels[part])
