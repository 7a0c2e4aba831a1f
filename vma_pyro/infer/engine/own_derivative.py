r"""Whether the gradient that programs have for values they read is the derivative of log w.

A program that compares, rounds or detaches what it makes of a value has a log w that jumps, or that moves while
its gradient does not. The mean of that gradient is then not the gradient of the mean, and nothing in a single draw
shows it. On a straight line from one value x to another it does show:

.. math::
    \int_0^t (x' - x) \cdot \nabla \log w(x + s (x' - x)) \, ds \ne \log w(x + t (x' - x)) - \log w(x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = (32, 256)  # the second where the first is too coarse to tell
TOLERANCE = 0.02  # of how far log w moves on the way
ROUNDING = 1e-4  # of the largest log w


class Line(NamedTuple):
    """A straight line of values of one site, and how what belongs to its elements is summed by datapoint."""

    start: Tensor
    end: Tensor
    by_datapoint: Callable[[Tensor], Float[Tensor, "K B"]]

    def at(self, t: float) -> Tensor:
        """Values after a part t of the way."""
        return torch.lerp(self.start, self.end, t)


Lines = Mapping[str, Line]  # by the name of the site
LogW = Callable[[Mapping[str, Tensor]], Float[Tensor, "K B"]]


class Gap(NamedTuple):
    """How far log w moves on the way, and how far its gradient says."""

    moved: float
    expected: float


def find_gap(lines: Lines, log_w: LogW) -> Gap | None:
    """Follow the lines; the widest gap over the datapoints, None where there is none.

    Args:
        lines: of all sites that move, at the same time.
        log_w: of values, by the name of the site.
    """
    for steps in STEPS:
        moved, expected, allowed = _along(lines, log_w, steps)
        off = (moved - expected).abs() - allowed
        if not bool((off > 0).any()):
            return None
    worst = int(off.argmax())
    return Gap(moved.flatten()[worst].item(), expected.flatten()[worst].item())


def _along(lines: Lines, log_w: LogW, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the lines: how far log w has moved [steps, K, B], how far by its gradient, what may lie between."""
    values, slopes = [], []
    for step in range(steps + 1):
        at = {name: line.at(step / steps).requires_grad_() for name, line in lines.items()}
        # The same noise each time, also of what draws by other means than a site, such as a dropout.
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            value = log_w(at)
            found = torch.autograd.grad(value.sum(), list(at.values()), allow_unused=True)
        slope = torch.zeros_like(value)
        for line, gradient in zip(lines.values(), found, strict=True):
            if gradient is not None:
                slope = slope + line.by_datapoint(gradient * (line.end - line.start))
        values.append(value.detach())
        slopes.append(slope)
    value, slope = torch.stack(values), torch.stack(slopes) / steps
    moved = value[1:] - value[0]
    expected = ((slope[1:] + slope[:-1]) / 2).cumsum(0)
    # Where a value is impossible nothing can be said.
    expected = torch.where(torch.isfinite(moved - expected), expected, moved)
    way = torch.maximum(slope.abs().sum(0), value.diff(dim=0).abs().sum(0))
    return moved, expected, (TOLERANCE * way + ROUNDING * value.abs().amax(0)).nan_to_num(0.0)
