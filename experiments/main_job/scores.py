"""The few-shot scores of a model on unseen classes.

NLL at s shots: each test image under a memory of its own with s other examples of its class (C = 1).
Classification: p(c|x) from q(a|x) under w classes with s examples. KL split: a memory of 32 entries, as in the
paper's training (8 classes x 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from common.protocols import TASKS, accuracy, nll_of_each
from vma_pyro.data import Episode, EpisodeSampler, ImageClasses, NestedEpisodes
from vma_pyro.data.episodes import most_queries
from vma_pyro.evaluation import KLReport, Mean, address_posterior, encoded_bank, kl_report, mutual_information
from vma_pyro.models import Pair

SHOTS = (1, 2, 5, 10, 19)


class Amounts(NamedTuple):
    """Says how much to measure.

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
    """Holds scores on unseen classes.

    Attributes:
        nll: number of shots to the NLL in nats per image, an upper bound by importance sampling.
        nll_of_images: the same before averaging, [images]; the images are the same at every number of shots.
        accuracy: "w-way s-shot" to the share of images whose most probable class is right.
        kl: the bound taken apart under the memory of the KL split, one memory per image.
        mutual_information: between x and the address under one memory shared by all images, in nats.
        split_memory: classes of the memory of the KL split, and the most examples of one, as far as there are.
    """

    nll: dict[str, Mean]
    nll_of_images: dict[str, Float[Tensor, " images"]]
    accuracy: dict[str, Mean]
    kl: KLReport
    mutual_information: Mean
    split_memory: tuple[int, int]


def score(pair: Pair, characters: ImageClasses, amounts: Amounts, *, device: torch.device) -> FewShotScores:
    """Measure everything; shots and ways beyond what the classes offer are left out.

    Args:
        pair: model and guide, programs of (memory, x).
        characters: unseen classes.
        amounts: how much to measure.
        device: where model and guide live.
    """
    examples = characters.examples
    nll = {
        str(shots): likelihood_scores(pair, characters, amounts, shots=shots, device=device)
        for shots in SHOTS
        if shots < examples
    }
    shares = accuracies(pair, characters, amounts, device=device)
    e = _split_episode(characters, amounts).to(device)
    kl = kl_report(*pair, e.memory, e.x, labels=e.labels, num_samples=amounts.samples)
    shared = shared_episode(characters, amounts).to(device)
    information = mutual_information(address_posterior(pair[1], shared.memory, shared.x))
    means = {shots: Mean.of(values) for shots, values in nll.items()}
    return FewShotScores(means, nll, shares, kl, information, split_sizes(characters, amounts))


def likelihood_scores(
    pair: Pair, characters: ImageClasses, amounts: Amounts, *, shots: int = 1, device: torch.device
) -> Float[Tensor, " images"]:
    """Measure the NLL of the likelihood protocol's images, nats; without a memory the shots have no effect."""
    nested = NestedEpisodes(characters, images=amounts.images, seed=amounts.seed)
    return nll_of_each(pair, nested.episodes(1, shots), amounts.samples, device=device)


def accuracies(pair: Pair, characters: ImageClasses, amounts: Amounts, *, device: torch.device) -> dict[str, Mean]:
    """Measure all classification tasks that the classes offer; what the memories share is encoded once."""
    examples = characters.examples
    tasks = [(ways, shots) for ways, shots in TASKS if ways <= len(characters) and shots < examples]
    if not tasks and len(characters) > 1:  # fewer classes than the usual tasks have
        tasks = [(len(characters), 1)]
    nested = NestedEpisodes(characters, images=amounts.queries, seed=amounts.seed)
    if len(nested) * sum(ways * shots for ways, shots in tasks) > len(characters.pixels):
        nested = encoded_bank(pair[1], nested, device=device)
    return {
        f"{ways}-way {shots}-shot": accuracy(pair, nested.episodes(ways, shots), device=device)
        for ways, shots in tasks
    }


def split_sizes(characters: ImageClasses, amounts: Amounts) -> tuple[int, int]:
    """Find how many classes the memory of the KL split has, and how many examples of one at most."""
    return min(amounts.classes, len(characters)), min(amounts.shots, characters.examples - 1)


def gained_over(
    memoryless: Pair, scores: FewShotScores, characters: ImageClasses, amounts: Amounts, *, device: torch.device
) -> FewShotScores:
    """Add to the KL split of scores the information gained over a model and guide without memory."""
    nll = nll_of_each(memoryless, [_split_episode(characters, amounts)], amounts.samples, device=device)
    return scores._replace(kl=scores.kl.gained_over(nll.to(scores.kl.nll_of_images.device)))


def shared_episode(characters: ImageClasses, amounts: Amounts) -> Episode:
    """Draw figure 3's memory: 8 unseen classes with 10 examples (or half of what there is) and images of them."""
    classes = min(8, len(characters))
    shots = max(1, min(10, characters.examples // 2))
    queries = min(most_queries(torch.as_tensor(characters.counts), classes, shots), amounts.images)
    return EpisodeSampler(characters, classes=classes, shots=shots, queries=queries, seed=amounts.seed).sample()


def one_example_each(characters: ImageClasses, amounts: Amounts, number: int) -> Tensor:
    """Draw examples [number, 1, 28, 28] of unseen classes."""
    return _sampler(characters, amounts, 1, 1, number).sample().memory.entries[:, 0]


def _sampler(characters: ImageClasses, amounts: Amounts, classes: int, shots: int, queries: int) -> EpisodeSampler:
    return EpisodeSampler(
        characters, classes=classes, shots=shots, queries=queries, seed=amounts.seed, shared_memory=False
    )


def _split_episode(characters: ImageClasses, amounts: Amounts) -> Episode:
    classes, shots = split_sizes(characters, amounts)
    return _sampler(characters, amounts, classes, shots, amounts.images).sample()
