"""Pictures of what a trained model does with unseen classes; no picture costs a report."""

from __future__ import annotations

from pathlib import Path

import torch

from common.images import pixels, save_generated, save_posterior
from main_job.scores import Amounts, one_example_each, shared_episode
from vma_pyro.data import ImageClasses
from vma_pyro.evaluation import address_posterior
from vma_pyro.models import Pair


def draw_samples(
    pair: Pair, characters: ImageClasses, amounts: Amounts, path: Path, *, device: torch.device
) -> None:
    """Draw what is generated from one example each: images, and their means given z and the entry."""
    entries = one_example_each(characters, amounts, 12).to(device)
    title = "the one entry in memory, of an unseen class | draws of x | E[x | z, m] of the same z"
    save_generated(path, pair[0], entries, title=title, ink=is_ink(characters))


def draw_posterior(
    pair: Pair, characters: ImageClasses, amounts: Amounts, path: Path, *, device: torch.device
) -> None:
    """Draw the address posterior of some images."""
    episode = shared_episode(characters, amounts).to(device)
    shown = [int((episode.labels == label).nonzero()[0]) for label in episode.labels.unique()[:4]]
    probs = address_posterior(pair[1], episode.memory, episode.x[shown])
    assert episode.memory.labels is not None
    save_posterior(
        path,
        pixels(episode.x[shown], ink=is_ink(characters)),
        probs.float().cpu().numpy(),
        pixels(episode.memory.entries, ink=is_ink(characters)),
        episode.memory.labels.cpu().numpy(),
        episode.labels[shown].cpu().numpy(),
    )


def is_ink(characters: ImageClasses) -> bool:
    """Whether 1 is ink on paper; images of 8 bits are light where they are 1."""
    return characters.bits == 1


PICTURES = {"samples.png": draw_samples, "posterior.png": draw_posterior}
