"""Looks at the values of images and entries: what is refused, and what is named because it may be meant.

Only on the CPU: on a GPU every look would stall the queue.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MOST_INK = 0.6  # share of pixels; of the darkest image of Omniglot and MNIST 0.4
BYTES = 16  # values above it are no shares of ink

_left_out: set[str] | None = None


@contextmanager
def unchecked() -> Iterator[set[str]]:
    """No looks at values inside: while operations are recorded, tensors have none.

    Yields:
        The names of the checks that were left out, as they come up.
    """
    global _left_out
    before, _left_out = _left_out, set()
    try:
        yield _left_out
    finally:
        _left_out = before


def looks_at(check: str, values: Tensor) -> bool:
    """Whether values are checked: only on the CPU, as on a GPU every look at them would stall the queue."""
    if _left_out is not None:
        _left_out.add(check)
    return _left_out is None and values.device.type == "cpu"


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinity, with their number."""
    if looks_at("finite", values) and values.is_floating_point():
        if math.isfinite(values.detach().sum().item()):  # the sum of finite values may overflow: look again
            return
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {values.numel()}")


def check_labels(name: str, labels: Tensor, lead: torch.Size, mask: Tensor | None) -> None:
    """Refuse labels of another shape or type, or below 0 where nothing is masked, as padding would be an entry."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(labels).__name__}")
    if labels.shape != lead:
        raise ValueError(f"{name}: expected shape {list(lead)}, one label per entry, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64, got {labels.dtype}")
    if looks_at("labels", labels):
        counted = labels if mask is None else labels[mask]
        if bool((counted < 0).any()):
            low = int(counted.min())
            raise ValueError(
                f"{name}: expected 0 or more for every entry, got {low}; padding needs a mask, Memory(entries, "
                "labels, mask=labels >= 0)"
            )


def check_binary(name: str, images: Tensor, *, advice: str = "", inversion: bool = True) -> None:
    """Refuse images that a Bernoulli likelihood cannot score, with their range; warn of ink as 0.

    Args:
        name: for the messages.
        images: any shape.
        advice: what to do about images that are not binary.
        inversion: whether to warn where most pixels are 1.
    """
    if not looks_at("binary", images):
        return
    if not torch.equal(images * images, images):  # of all ways to ask the fastest
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"{name}: expected binary values 0 and 1, got values from {low:g} to {high:g}{advice}")
    if inversion:
        check_ink(name, images)


def check_ink(name: str, images: Tensor) -> None:
    """Warn of images most of which is ink, as if ink and paper had changed places."""
    ink = _mean(images) if looks_at("ink", images) else 0.0
    if ink > MOST_INK:
        # Rounded, so that Python shows the warning once and not with another number at every update.
        warnings.warn(
            f"{name}: expected ink (1) on paper (0), got about {10 * round(10 * ink)} % of all pixels 1; "
            f"give 1 - {name.split('.')[-1]} if ink is 0 there",
            stacklevel=2,
        )


def check_shares(name: str, images: Tensor) -> None:
    """Refuse images with values that are no shares of ink, with their range."""
    if looks_at("shares", images):
        low, high = (value.item() for value in images.detach().aminmax())
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise ValueError(f"{name}: expected values from 0 to 1, got values from {low:g} to {high:g}")


def check_levels(name: str, images: Tensor, levels: int) -> None:
    """Refuse images with values that are no multiples of 1 / (levels - 1) from 0 to 1."""
    check_shares(name, images)
    if looks_at("levels", images):
        steps = images.detach() * (levels - 1)
        off = (steps - steps.round()).abs().max().item()
        if off > 0.01:
            raise ValueError(
                f"{name}: expected {levels} levels, multiples of 1 / {levels - 1}, got values up to {off:.2g} of "
                "a step beside them; round them"
            )


def _mean(images: Tensor) -> float:
    return images.detach().mean(dtype=torch.float32).item()


def check_alike(x: Tensor, entries: Tensor) -> bool:
    """Refuse images whose values are not on the scale of the entries, whatever the likelihood.

    Returns:
        Whether ink and paper seem to have changed places between them; then a warning says so.
    """
    (x_low, x_high), (low, high) = ([t.item() for t in images.detach().aminmax()] for images in (x, entries))
    if min(x_low, low) < 0:
        return False
    for name, top, other, least in (("memory.entries", high, "x", x_high), ("x", x_high, "memory.entries", high)):
        if top > BYTES and 0 < least <= 1:  # bytes beside shares of ink
            raise ValueError(
                f"{name}: expected values from 0 to 1 as {other} has, got up to {top:g}; divide by 255"
            )
    if max(x_high, high) > 1 or x.shape[-3:-2] == (3,):  # there is no ink in colour
        return False
    shares = sorted((_mean(images), name) for name, images in (("x", x), ("memory.entries", entries)))
    (less, lighter), (more, darker) = shares
    inverted = less < 1 - MOST_INK and more > MOST_INK
    if inverted:
        warnings.warn(
            f"{darker}: expected mostly paper (0) as in {lighter}, got mostly ink (1); "
            f"give 1 - {darker.split('.')[-1]} if ink is 0 there",
            stacklevel=2,
        )
    return inverted
