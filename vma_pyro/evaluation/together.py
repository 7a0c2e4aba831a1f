"""Classification of all images of an episode at once: scores that look both ways, and one-to-one assignment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.evaluation.classification import classify, entry_log_likelihood
from vma_pyro.evaluation.likelihood import log_likelihood
from vma_pyro.memory import Memory

Program = Callable[..., Any]


class MatchScores(NamedTuple):
    """How well each image of an episode fits each class, in nats.

    Attributes:
        guide: log q(c | x, M), of `classify`.
        likelihood: log p(x | c), the mean over the entries of class c, of one image at a time.
        both_ways: the same, and the mean over the entries m of class c of log p(m | x) - log p(m): how much better
            x explains them than nothing does. An image of few strokes is probable under any entry; that one has
            few strokes, too, is not.
    """

    guide: Float[Tensor, "B C"]
    likelihood: Float[Tensor, "B C"]
    both_ways: Float[Tensor, "B C"]


def match_scores(
    model: Program,
    guide: Program,
    memory: Memory,
    x: Tensor,
    *,
    memoryless: tuple[Program, Program],
    num_samples: int = 10,
    seed: int = 0,
) -> MatchScores:
    """Score each image against each class, by entries and images that change places.

    Args:
        model, guide: programs of (memory, x) with a site `address`, and p(a | M) uniform.
        memory: shared, with labels from 0 to C - 1, each of which occurs, and entries of the shape of images.
        x: images [B, *E].
        memoryless: model and guide of p(m), programs of (memory, x) that leave the memory alone.
        num_samples: of z for each pair of an image and an entry.
        seed: of the evaluation's own random stream.

    Raises:
        ValueError: a memory that is not shared, has a mask, or lacks entries of a class; see `classify`.
    """
    if not isinstance(memory, Memory) or not memory.is_shared or memory.mask is not None:
        what = "another Memory" if isinstance(memory, Memory) else f"a {type(memory).__name__}"
        raise ValueError(f"memory: expected a Memory that all images share, without a mask, got {what}")
    own = classify(guide, memory, x, seed=seed)
    labels = memory.labels
    assert labels is not None  # or classify would have refused it
    counts = torch.bincount(labels, minlength=own.shape[1])
    if not bool(counts.all()):
        raise ValueError(f"memory.labels: expected entries of all classes, got {counts.tolist()} of them")
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    forward = entry_log_likelihood(model, guide, memory, x, **options) + math.log(memory.size)  # log p(x | m_a)
    entries = memory.entries
    swapped = Memory(x, torch.arange(len(x), device=x.device), event_dim=memory.event_dim)
    backward = entry_log_likelihood(model, guide, swapped, entries, **options).T + math.log(len(x))
    alone = log_likelihood(*memoryless, swapped, entries, **options)  # log p(m)
    of_class = in_double(torch.nn.functional.one_hot(labels, own.shape[1]))  # [S, C]
    each = torch.where(of_class > 0, (backward - alone)[:, :, None], 0.0)  # of another class, be it infinite
    explained = each.sum(1) / counts
    among = forward[:, :, None].masked_fill(of_class == 0, -math.inf).logsumexp(1) - in_double(counts).log()
    return MatchScores(in_double(own).log(), among, among + explained)


def assign(scores: Float[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """Give each image a class of its own, so that the sum of their scores is the largest there is.

    Args:
        scores: of each image for each class; minus infinity for what cannot be.

    Raises:
        ValueError: fewer classes than images, NaN, no assignment of finite scores.
    """
    from scipy.optimize import linear_sum_assignment  # half a second

    if scores.dim() != 2:
        raise ValueError(f"scores: expected shape [images, classes], got {list(scores.shape)}")
    images, classes = scores.shape
    if classes < images:
        raise ValueError(f"scores: expected at least as many classes as images, {images}, got {classes}")
    if scores.isnan().any() or scores.isposinf().any():
        raise ValueError("scores: expected numbers or minus infinity, got NaN or infinity")
    try:
        _, found = linear_sum_assignment(scores.detach().double().cpu().numpy(), maximize=True)
    except ValueError as error:
        raise ValueError("scores: expected an assignment of finite scores, found none") from error
    return torch.from_numpy(found).to(scores.device)
