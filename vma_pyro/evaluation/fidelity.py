"""Whether what a model generates from one example is of the class of it, by the eyes of a judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from vma_pyro.evaluation.chunks import check
from vma_pyro.evaluation.classification import classify
from vma_pyro.evaluation.estimates import Mean, undisturbed
from vma_pyro.memory import Memory


class Fidelity(NamedTuple):
    """Shares of images that a judge finds to be of their class.

    Attributes:
        generated: of images generated from one example each.
        real: of the examples themselves, the most that can be asked for of a perfect copy.
    """

    generated: Mean
    real: Mean


def class_fidelity(
    model: Callable[..., Any],
    judge: Callable[..., Any],
    memory: Memory,
    x: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
) -> Fidelity:
    """Generate an image from each of x alone, and have a judge classify it among the entries of a memory.

    A likelihood that leaves nothing to z and m draws sharp strokes of no class, with a good NLL: this tells it.
    None of x is in the memory, so that the judge has not seen what an image was generated from.

    Args:
        model: a program of (memory, x) with a site `x`.
        judge: a guide with a site `address`, the same for all models that are compared; not the model's own, which
            was trained to find whatever that model makes.
        memory: with labels, for each image or shared by all.
        x: real images [B, C, height, width].
        labels: class of each within the memory, int64 [B].
        seed: of what is generated.

    Returns:
        Shares with standard errors over the B images.

    Raises:
        ValueError: a memory without labels.
    """
    check(memory, x)
    if labels.shape != (len(x),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected int64 [{len(x)}], got {labels.dtype} {list(labels.shape)}")
    if memory.labels is not None and not bool(torch.isin(labels, memory.labels).all()):
        raise ValueError("labels: expected classes that are in the memory, got others")
    with undisturbed(model, seed=seed):
        trace = poutine.trace(model).get_trace(Memory(x.unsqueeze(1)))
        made: Any = trace.nodes["x"]["value"]
    right = [classify(judge, memory, images).argmax(-1) == labels for images in (made.to(x.dtype), x)]
    return Fidelity(*(Mean.of(found.to(torch.float32)) for found in right))
