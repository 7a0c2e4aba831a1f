"""Classification by the address: its posterior under the guide or the model, or the weights of a soft read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.evaluation.address import posterior_of_address
from vma_pyro.evaluation.chunks import check, datapoint_chunks, labels_of, weight_chunks
from vma_pyro.evaluation.draws import nesting_of
from vma_pyro.evaluation.estimates import undisturbed
from vma_pyro.infer.engine.running import run
from vma_pyro.memory import Memory


def address_posterior(
    guide: Callable[..., Any], memory: Any, x: Tensor, *, num_samples: int = 100, seed: int = 0
) -> Float[Tensor, "B S"]:
    """q(a | x, M), [B, S].

    Discrete sites before the address are summed over. What else the guide draws before it is averaged over; where
    nothing is, the result is exact.

    Args:
        guide: a program of (memory, x) with a site `address`.
        memory, x: what it takes.
        num_samples: draws of what comes before the address, where that is not summed over.
        seed: of the evaluation's own random stream.

    Raises:
        ValueError: no site `address` in the guide, or one of several values per image; no draws.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    check(memory, x)
    probs = []
    with undisturbed(guide, seed=seed):
        for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=1):
            probs.append(posterior_of_address(guide, part_memory, part, num_samples=num_samples))
    return torch.cat(probs)


def classify(
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_classes: int | None = None,
    num_samples: int = 100,
    seed: int = 0,
) -> Float[Tensor, "B C"]:
    """p(c | x) = sum of q(a | x, M) over the entries a of class c; no fine-tuning (section 4.2 of the paper).

    Args:
        guide: a program of (memory, x) with a site `address`.
        memory: a `Memory` with labels.
        x: images [B, *E].
        num_classes: C; None takes the largest label plus one.
        num_samples, seed: as in `address_posterior`.

    Returns:
        Probabilities [B, C].

    Raises:
        ValueError: a memory without labels, or with labels beyond `num_classes`.
    """
    num_classes = _check_labels(memory, num_classes)
    probs = address_posterior(guide, memory, x, num_samples=num_samples, seed=seed)
    return _by_class(probs, memory, num_classes)


def classify_by_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int = 10,
    num_classes: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "B C"]:
    r"""p(c | x, M) under the model: each entry's likelihood estimated by importance sampling.

    .. math:: p(c \mid x, M) \propto \sum_{a \in c} p(a \mid M) \frac1N \sum_n
              \frac{p(x, z_{na} \mid m_a)}{q(z_{na} \mid x, m_a)}

    What q(a | x, M) approximates, at |M| N decoder evaluations per image.

    Args:
        model, guide: programs of (memory, x).
        memory: a `Memory` with labels.
        x: images [B, *E].
        num_samples: N.
        num_classes: C; None takes the largest label plus one.
        seed: of the evaluation's own random stream.

    Returns:
        Probabilities [B, C].

    Raises:
        ValueError: as `classify`; N below 1.
    """
    num_classes = _check_labels(memory, num_classes)
    scores = entry_log_likelihood(model, guide, memory, x, num_samples=num_samples, seed=seed)
    return _by_class(scores.softmax(1), memory, num_classes)


def entry_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int = 10,
    seed: int = 0,
) -> Float[Tensor, "B S"]:
    r"""An estimate of log p(x, a | M) for every entry, a lower bound in expectation.

    .. math:: \log p(a \mid M) + \log \frac1N \sum_n \frac{p(x, z_{na} \mid m_a)}{q(z_{na} \mid x, m_a)}

    Args:
        model, guide: programs of (memory, x) with a site `address`.
        memory: a `Memory` with labels.
        x: images [B, *E].
        num_samples: N, at |M| N decoder evaluations per image.
        seed: of the evaluation's own random stream.

    Returns:
        Nats [B, S], float64.

    Raises:
        ValueError: as `classify`; N below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    check(memory, x)
    size = labels_of(memory).shape[-1]
    found = []
    with undisturbed(model, guide, seed=seed):
        nesting = 0
        for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=size):
            nesting = nesting or nesting_of(model, guide, part_memory, part)
            total = in_double(torch.full((size, len(part)), -math.inf, device=x.device))
            rows = 0  # the chunks of one draw follow the addresses
            for log_w in weight_chunks(
                model, guide, part_memory, part, num_samples, size, "exact", nesting=nesting
            ):
                at = slice(rows, rows + len(log_w))
                total[at] = torch.logaddexp(total[at], in_double(log_w).logsumexp(1))
                rows = at.stop % size
            found.append(total.T - math.log(num_samples))
    return torch.cat(found)


def classify_by_attention(
    model: Any,
    guide: Callable[..., Any],
    memory: Memory,
    x: Tensor,
    *,
    num_samples: int = 10,
    num_classes: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "B C"]:
    """p(c | x) of soft attention: the mean over q(z | x) of the weight that the read gives to class c.

    Args:
        model: with `networks` and `attention`, as `SoftAttentionModel`.
        guide: a program of (memory, x) with a site `z`.
        memory: with labels.
        x: images [B, *E].
        num_samples: draws of z per image.
        num_classes: C; None takes the largest label plus one.
        seed: of the evaluation's own random stream.

    Returns:
        Probabilities [B, C].

    Raises:
        ValueError: as `classify`.
    """
    num_classes = _check_labels(memory, num_classes)
    check(memory, x)
    found = []
    with undisturbed(model, guide, seed=seed):
        for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=num_samples):
            with pyro.plate("samples", num_samples, dim=-2):
                z = run(guide, (part_memory, part), {}).nodes["z"]["value"]
            found.append(model.attention(z, part_memory.encode(model.networks)).mean(0))
    return _by_class(torch.cat(found), memory, num_classes)


def _check_labels(memory: Any, num_classes: int | None) -> int:
    labels, mask = labels_of(memory), getattr(memory, "mask", None)
    labels = labels if mask is None else labels[mask]  # those of padding may be anything
    low, high = int(labels.min()), int(labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        hint = "; give padding a mask, Memory(..., mask=labels >= 0)" if low < 0 else ""
        raise ValueError(f"memory.labels: expected values 0..{num_classes - 1}, got {low}..{high}{hint}")
    return num_classes


def _by_class(probs: Float[Tensor, "B S"], memory: Any, num_classes: int) -> Float[Tensor, "B C"]:
    """Probability of the entries of each class."""
    labels, mask = labels_of(memory), getattr(memory, "mask", None)
    labels = labels if mask is None else labels.where(mask, 0)  # padding has no probability
    labels = labels.to(probs.device).expand(len(probs), -1)
    return probs.new_zeros(len(probs), num_classes).scatter_add_(1, labels, probs)
