"""A rehearsal of the job on two images: what would fail after hours of training fails in a second before it."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.infer.elbo import ELBO

from common.protocols import first_of
from main_job.footprint import COPIES, available, bytes_of_update
from main_job.scores import SHOTS, Amounts, FewShotScores, shared_episode
from vma_pyro import models
from vma_pyro.data import Episode, ImageClasses
from vma_pyro.training.faults import check_params, find_fault

GB = 1e9


@contextmanager
def on_two_images() -> Iterator[None]:
    """Say in one line what a program cannot do."""
    try:
        yield
    except FloatingPointError:
        raise
    except Exception as error:
        told = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, ValueError | OSError) and re.match(r"[\w. ']+: expected ", told):
            if isinstance(error, ValueError) and told != str(error):
                raise ValueError(told) from error  # without the shapes that Pyro adds
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"rehearsal: expected the job to run on two images, got {type(error).__name__} ({told}) in line "
            f"{where.lineno} of {where.filename}"
        ) from error


def check_weights_fit(architecture: dict[str, Any], device: torch.device) -> None:
    """Refuse networks that do not fit into memory, before they are made.

    Raises:
        ValueError: which size is too large.
    """
    if count_bytes(architecture) <= (free := available(device)):
        return
    small = {"width": 0.1, "latent_dim": 2, "refinement": 0}
    others = [name for name in small if name in architecture]
    # The one that has to become smaller for the rest to fit.
    name = next((n for n in others if count_bytes({**architecture, n: small[n]}) <= free), others[0])
    raise ValueError(
        f"{name}: expected networks whose weights and their gradients fit into {free / GB:.1f} GB, got "
        f"{count_bytes(architecture) / GB:.1f} GB with {architecture[name]}; lower it"
    )


def count_bytes(architecture: dict[str, Any]) -> float:
    """Count the bytes of all copies of the weights that training has; infinite beyond what can be counted."""
    try:
        with torch.device("meta"):
            model = models.as_one(models.build(architecture))
    except (RuntimeError, OverflowError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__cause__, TypeError):
            raise
        return math.inf  # torch cannot even count them
    return float(COPIES * sum(p.numel() * p.element_size() for p in model.parameters()))


def check_update_fits(
    pair: models.Pair,
    elbo: Callable[[int], ELBO],
    few: Episode,
    *,
    particles: int,
    queries: int,
    device: torch.device,
) -> None:
    """Try an update with few particles and images, and refuse one that does not fit into memory.

    Args:
        pair: model and guide, on the device.
        elbo: the objective with so many particles.
        few: four images (or fewer) with their memory.
        particles, queries: K and the images of an update in training.
        device: where to train.

    Raises:
        ValueError: too many particles or images; a parameter that is nobody's.
    """
    few = few.to(device)
    check_params(*pair, few.memory, few.x, parameters=models.as_one(pair).parameters())
    needed = bytes_of_update(
        *pair, elbo, partial(first_of, few), particles=particles, queries=queries, device=device
    )
    free = available(device)
    if needed > free:
        name, now = max(("queries", queries), ("particles", particles), key=lambda item: item[1])
        raise ValueError(
            f"{name}: expected an update that fits into the {free / GB:.1f} GB there are, got one of about "
            f"{needed / GB:.1f} GB with {particles} particles for each of {queries} images; lower {name} to "
            f"{max(1, int(now * 0.9 * free / needed))} or less"
        )


def check_images_fit(amounts: Amounts, image_shape: tuple[int, int, int]) -> None:
    """Refuse more test images than fit into memory, each with a memory of its own.

    Raises:
        ValueError: too many.
    """
    free = available(torch.device("cpu"))
    each = 4 * math.prod(image_shape) * (1 + max(amounts.classes * amounts.shots, *SHOTS))
    if amounts.images * each > free:
        raise ValueError(
            f"eval_images: expected at most {int(free / each)}, which fit into the {free / GB:.1f} GB there are, "
            f"got {amounts.images}"
        )


def check_scores(
    pair: models.Pair,
    scores: FewShotScores,
    characters: ImageClasses,
    amounts: Amounts,
    device: torch.device,
) -> None:
    """Refuse a model whose likelihoods are no numbers, by the site that they come from.

    Raises:
        FloatingPointError: such a site.
    """
    if all(bool(values.isfinite().all()) for values in scores.nll_of_images.values()):
        return
    e = shared_episode(characters, amounts).to(device)
    parameters = [p for p in models.as_one(pair).parameters() if p.requires_grad]
    fault = find_fault(*pair, e.memory, e.x, parameters=parameters, noise=None)
    raise FloatingPointError(fault or "site 'x': expected a log probability, got NaN or infinity")
