"""Evaluation in pieces: any number of images, samples and addresses in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer import log_weights, log_weights_given
from vma_pyro.memory import Memory
from vma_pyro.memory.checks import check_finite
from vma_pyro.program import Program

# Decoder evaluations per chunk: bounds the memory of an evaluation at a few hundred MB for the paper's networks.
READS_PER_CHUNK = 2048
MAX_IMAGES_PER_CHUNK = 256


def weight_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    num_samples: int,
    size: int,
    address: str,
    *,
    nesting: int,
) -> Iterator[Float[Tensor, "*S K B"]]:
    """Log weights [..., B] of at most about READS_PER_CHUNK decoder evaluations at a time."""
    for k in sample_chunks(num_samples, images=size * len(x)):
        if address == "sampled":
            yield log_weights(model, guide, (memory, x), num_particles=k, max_plate_nesting=nesting)
            continue
        rows = max(1, READS_PER_CHUNK // (k * len(x)))
        for addresses in torch.arange(size, device=x.device).split(rows):
            given = {"address": addresses}
            yield log_weights_given(given, model, guide, (memory, x), num_particles=k, max_plate_nesting=nesting)


def datapoint_chunks(guide: Any, memory: Any, x: Tensor, *, reads_per_image: int) -> Iterator[tuple[Tensor, Any]]:
    """Images and their memories, so that one chunk makes at most about READS_PER_CHUNK decoder evaluations.

    Parameters do not change during an evaluation: each entry is encoded once, not once per chunk of samples.
    """
    rows = max(1, READS_PER_CHUNK // reads_per_image)
    own = not is_shared(memory, x)
    if own:
        # A memory of its own per image is encoded once per chunk: keep its entries within bounds as well.
        size = memory.size if isinstance(memory, Memory) else memory.shape[1]
        rows = max(1, min(rows, READS_PER_CHUNK // size))
    rows = min(rows, MAX_IMAGES_PER_CHUNK)
    if not own:
        memory = encoded_by(guide, memory, x)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        if not own:
            yield x[part], memory
        elif isinstance(memory, Memory):
            yield x[part], encoded_by(guide, memory.datapoints(part), x[part])
        else:
            yield x[part], memory[part]


def encoded_by(guide: Any, memory: Any, *x: Tensor) -> Any:
    """Have a guide of this package encode a memory (for datapoints x); other programs do so for themselves."""
    if isinstance(memory, Memory) and isinstance(guide, Program):
        return guide.prepare(memory, *x).args[0]
    return memory


def is_shared(memory: Any, x: Tensor) -> bool:
    """Whether all images have one memory; a tensor with one dimension more than x holds one for each."""
    if isinstance(memory, Memory):
        return memory.is_shared
    return not (isinstance(memory, Tensor) and memory.dim() == x.dim() + 1)


def labels_of(memory: Any) -> Tensor:
    """The labels of the entries [S] or [B, S].

    Raises:
        ValueError: a memory without labels.
    """
    labels = getattr(memory, "labels", None)
    if not isinstance(labels, Tensor):
        raise ValueError(f"memory.labels: expected labels of the entries, got {labels}")
    return labels


def check(memory: Any, x: Tensor) -> None:
    """Refuse images that cannot be evaluated; whether they fit the entries is for model and guide to say.

    Raises:
        ValueError: no images, NaN in them, or another number of images than memories.
    """
    if x.dim() < 1 or len(x) == 0:
        raise ValueError(f"x: expected at least one image, got shape {list(x.shape)}")
    check_finite("x", x.cpu())  # on a GPU one wait per evaluation is no matter
    if not is_shared(memory, x):
        batch = memory.batch_size if isinstance(memory, Memory) else len(memory)
        if batch != len(x):
            raise ValueError(f"x: expected {batch} images, one per memory, got {len(x)}")


def sample_chunks(num_samples: int, *, images: int) -> Iterator[int]:
    """Numbers of samples that add up to `num_samples`, so that each chunk makes about READS_PER_CHUNK reads."""
    chunk = max(1, READS_PER_CHUNK // images)
    for start in range(0, num_samples, chunk):
        yield min(chunk, num_samples - start)
