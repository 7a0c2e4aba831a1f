"""The few-shot protocol on unseen classes: scores of a model, and pictures of what it does.

NLL at s shots: each test image under a memory of its own with s other examples of its class (C = 1).
Classification: p(c|x) from q(a|x) under w classes with s examples. KL split: a memory of 32 entries, as in the
paper's training (8 classes x 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from common import plots
from vma_pyro.data import Characters, EpisodeSampler
from vma_pyro.data.episodes import Episode
from vma_pyro.evaluation import (
    Estimate,
    KLReport,
    address_posterior,
    classify,
    distribution_at,
    kl_report,
    log_likelihood,
    undisturbed,
)
from vma_pyro.memory import Memory

SHOTS = (1, 2, 5, 10, 19)
WAYS_AND_SHOTS = ((5, 1), (5, 5), (20, 1), (20, 5))

Program = Callable[..., Any]


class Protocol(NamedTuple):
    """How much to measure.

    Attributes:
        images: test images per likelihood, the same images at every number of shots.
        samples: importance samples per image.
        queries: test images per classification task.
        classes, shots: of the memory of the KL split.
        seed: of the episodes.
    """

    images: int = 500
    samples: int = 1000
    queries: int = 1000
    classes: int = 8
    shots: int = 4
    seed: int = 0


class FewShotScores(NamedTuple):
    """Scores on unseen classes.

    Attributes:
        nll: number of shots to the NLL in nats per image, an upper bound by importance sampling.
        nll_of_images: the same before averaging, [images]; the images are the same at every number of shots.
        accuracy: "w-way s-shot" to the share of images whose most probable class is right.
        kl: the bound taken apart under the memory of the KL split, one memory per image.
        mutual_information: between x and the address under one memory shared by all images, in nats.
    """

    nll: dict[str, Estimate]
    nll_of_images: dict[str, Float[Tensor, " images"]]
    accuracy: dict[str, Estimate]
    kl: KLReport
    mutual_information: Estimate


def score(
    model: Program,
    guide: Program,
    characters: Characters,
    protocol: Protocol,
    *,
    device: torch.device,
) -> FewShotScores:
    """Measure everything; shots and ways beyond what the classes offer are left out.

    Args:
        model, guide: programs of (memory, x).
        characters: unseen classes.
        protocol: how much to measure.
        device: where model and guide live.
    """
    examples = characters.images.shape[1]
    nll = {
        str(shots): -log_likelihood(model, guide, e.memory, e.x, num_samples=protocol.samples)
        for shots in SHOTS
        if shots < examples
        for e in [_likelihood_episode(characters, protocol, shots).to(device)]
    }
    accuracy = {
        f"{ways}-way {shots}-shot": accuracy_of(guide, characters, protocol, ways=ways, shots=shots, device=device)
        for ways, shots in WAYS_AND_SHOTS
        if ways <= len(characters) and shots < examples
    }
    e = _split_episode(characters, protocol).to(device)
    kl = kl_report(model, guide, e.memory, e.x, labels=e.labels, num_samples=protocol.samples)
    shared = shared_episode(characters, protocol).to(device)
    information = kl_report(model, guide, shared.memory, shared.x, num_samples=1).mutual_information
    assert information is not None  # the memory is shared
    means = {shots: Estimate.of(values) for shots, values in nll.items()}
    return FewShotScores(means, nll, accuracy, kl, information)


def information_gained(
    scores: FewShotScores,
    memoryless: Sequence[Program],
    characters: Characters,
    protocol: Protocol,
    *,
    device: torch.device,
) -> FewShotScores:
    """The same scores, whose KL split has the information gained over a model and guide without memory."""
    episode = _split_episode(characters, protocol).to(device)
    model, guide = memoryless
    nll = -log_likelihood(model, guide, episode.memory, episode.x, num_samples=protocol.samples)
    return scores._replace(kl=scores.kl.gained_over(nll))


def memoryless_nll(
    memoryless: Sequence[Program], characters: Characters, protocol: Protocol, *, device: torch.device
) -> Tensor:
    """NLL of the images of the likelihood protocol under a model and guide without memory, [images]."""
    model, guide = memoryless
    episode = _likelihood_episode(characters, protocol, 1).to(device)
    return -log_likelihood(model, guide, episode.memory, episode.x, num_samples=protocol.samples)


def accuracy_of(
    guide: Program, characters: Characters, protocol: Protocol, *, ways: int, shots: int, device: torch.device
) -> Estimate:
    """Share of test images classified right from q(a|x), each under a memory of its own."""
    right = []
    stream = _sampler(characters, ways, shots, min(100, protocol.queries), protocol.seed)
    for _ in range(-(-protocol.queries // stream.queries)):
        episode = stream.sample().to(device)
        probs = classify(guide, episode.memory, episode.x, num_classes=ways)
        right.append(probs.argmax(-1) == episode.labels)
    return Estimate.of(torch.cat(right)[: protocol.queries])


def generate(model: Program, entries: Tensor, *, num_samples: int, seed: int = 0) -> Tensor:
    """Ink probabilities of images generated from one memory entry each.

    Args:
        model: program of (memory, x).
        entries: [N, 1, 28, 28]; each is the only entry of its memory.
        num_samples: images per entry.
        seed: of the random stream.

    Returns:
        E[x | z, m] for samples of z [N, num_samples, 1, 28, 28].
    """
    memory = Memory(entries.unsqueeze(1), learned=True)  # they may be: ink probabilities
    with undisturbed(model, seed=seed):
        plate = pyro.plate("samples", num_samples, dim=-2)
        trace = poutine.trace(plate(model)).get_trace(memory)
    mean: Tensor = distribution_at(trace, "x").mean
    return mean.transpose(0, 1)


def draw_samples(
    model: Program,
    guide: Program,
    characters: Characters,
    protocol: Protocol,
    path: Path,
    *,
    device: torch.device,
) -> None:
    """What is generated from one example each."""
    entries = _sampler(characters, 1, 1, 12, protocol.seed).sample().memory.entries[:, 0].to(device)
    samples = generate(model, entries, num_samples=12)
    title = "left: the one entry in memory, an unseen class; right: E[x | z, m] for z from p(z | m)"
    plots.save_samples(path, pixels(entries), pixels(samples), title=title)


def draw_posterior(
    model: Program,
    guide: Program,
    characters: Characters,
    protocol: Protocol,
    path: Path,
    *,
    device: torch.device,
) -> None:
    """The address posterior of some images."""
    episode = shared_episode(characters, protocol).to(device)
    shown = [int((episode.labels == label).nonzero()[0]) for label in episode.labels.unique()[:4]]
    probs = address_posterior(guide, episode.memory, episode.x[shown])
    assert episode.memory.labels is not None
    plots.save_posterior(
        path,
        pixels(episode.x[shown]),
        probs.float().cpu().numpy(),
        pixels(episode.memory.entries),
        episode.memory.labels.cpu().numpy(),
        episode.labels[shown].cpu().numpy(),
    )


PICTURES = {"samples.png": draw_samples, "posterior.png": draw_posterior}


def shared_episode(characters: Characters, protocol: Protocol) -> Episode:
    """Figure 3's memory: 8 unseen classes with 10 examples (or half of what there is) and images of them."""
    classes = min(8, len(characters))
    shots = min(10, characters.images.shape[1] // 2)
    queries = min(classes * (characters.images.shape[1] - shots), protocol.images)
    return EpisodeSampler(
        characters, classes=classes, shots=max(1, shots), queries=queries, seed=protocol.seed
    ).sample()


def pixels(images: Tensor) -> Any:
    """[..., 1, 28, 28] to an array [..., 28, 28]."""
    return images.squeeze(-3).float().cpu().numpy()


def _sampler(characters: Characters, classes: int, shots: int, queries: int, seed: int) -> EpisodeSampler:
    return EpisodeSampler(
        characters, classes=classes, shots=shots, queries=queries, seed=seed, shared_memory=False
    )


def _episode(characters: Characters, protocol: Protocol, classes: int, shots: int, images: int) -> Episode:
    classes = min(classes, len(characters))
    return _sampler(characters, classes, shots, images, protocol.seed).sample()


def _likelihood_episode(characters: Characters, protocol: Protocol, shots: int) -> Episode:
    # The sampler nests the memories of one seed: all numbers of shots score the same images.
    return _episode(characters, protocol, 1, shots, protocol.images)


def _split_episode(characters: Characters, protocol: Protocol) -> Episode:
    return _episode(characters, protocol, protocol.classes, protocol.shots, protocol.images)
