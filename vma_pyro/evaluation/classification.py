"""Classification by the address posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from vma_pyro.evaluation.chunks import check, datapoint_chunks, labels_of
from vma_pyro.evaluation.estimates import distribution_at, undisturbed


def address_posterior(guide: Callable[..., Any], memory: Any, x: Tensor) -> Float[Tensor, "B S"]:
    """q(a | x, M), [B, S]."""
    check(memory, x)
    probs = []
    with undisturbed(guide, seed=0):
        for part, part_memory in datapoint_chunks(memory, x, reads_per_image=1):
            trace = poutine.trace(guide).get_trace(part_memory, part)
            if "address" not in trace.nodes:
                raise ValueError(f"guide: expected a site 'address', found {list(trace.stochastic_nodes)}")
            probs.append(distribution_at(trace, "address").probs)
    return torch.cat(probs)


def classify(
    guide: Callable[..., Any], memory: Any, x: Tensor, *, num_classes: int | None = None
) -> Float[Tensor, "B C"]:
    """p(c | x) = sum of q(a | x, M) over the entries a of class c; no fine-tuning (section 4.2 of the paper).

    Args:
        guide: a program of (memory, x) with a site `address`.
        memory: a `Memory` with labels.
        x: images [B, *E].
        num_classes: C; None takes the largest label plus one.

    Returns:
        Probabilities [B, C].

    Raises:
        ValueError: a memory without labels, or with labels beyond `num_classes`.
    """
    labels = labels_of(memory)
    low, high = int(labels.min()), int(labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ValueError(f"memory.labels: expected values 0..{num_classes - 1}, got {low}..{high}")
    q = address_posterior(guide, memory, x)
    labels = labels.expand(len(x), -1)
    return torch.zeros(len(x), num_classes, dtype=q.dtype, device=q.device).scatter_add_(1, labels, q)
