"""Evaluation in pieces: any number of images, samples and addresses in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vma_pyro.infer import log_weights, log_weights_given
from vma_pyro.memory import Memory, check_finite

# Decoder evaluations per chunk: bounds the memory of an evaluation at a few hundred MB for the paper's networks.
READS_PER_CHUNK = 2048
MAX_IMAGES_PER_CHUNK = 256


def weight_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Memory,
    x: Tensor,
    num_samples: int,
    size: int,
    address: str,
) -> Iterator[Tensor]:
    """Log weights [..., B] of at most about READS_PER_CHUNK decoder evaluations at a time."""
    for k in sample_chunks(num_samples, images=size * len(x)):
        if address == "sampled":
            yield log_weights(model, guide, (memory, x), num_particles=k)
            continue
        rows = max(1, READS_PER_CHUNK // (k * len(x)))
        for addresses in torch.arange(size, device=x.device).split(rows):
            yield log_weights_given({"address": addresses}, model, guide, (memory, x), num_particles=k)


def datapoint_chunks(memory: Memory, x: Tensor, *, reads_per_image: int) -> Iterator[tuple[Tensor, Memory]]:
    """Images and their memories, so that one chunk makes at most about READS_PER_CHUNK decoder evaluations."""
    rows = max(1, READS_PER_CHUNK // reads_per_image)
    # A memory of its own per image is encoded once per chunk: keep its entries within bounds as well.
    if not memory.is_shared:
        rows = max(1, min(rows, READS_PER_CHUNK // memory.size))
    rows = min(rows, MAX_IMAGES_PER_CHUNK)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield x[part], memory.datapoints(part)


def checked(memory: Memory | Tensor, x: Tensor) -> Memory:
    """The memory, if the images fit it.

    Raises:
        ValueError: no images, NaN in them, or images that do not fit the memory.
    """
    if x.dim() < 1 or len(x) == 0:
        raise ValueError(f"x: expected at least one image, got shape {list(x.shape)}")
    check_finite("x", x.cpu())  # on a GPU one wait per evaluation is no matter
    memory = memory if isinstance(memory, Memory) else Memory(memory, event_dim=x.dim() - 1)
    memory.check(x)
    return memory


def sample_chunks(num_samples: int, *, images: int) -> Iterator[int]:
    """Numbers of samples that add up to `num_samples`, so that each chunk makes about READS_PER_CHUNK reads."""
    chunk = max(1, READS_PER_CHUNK // images)
    for start in range(0, num_samples, chunk):
        yield min(chunk, num_samples - start)
