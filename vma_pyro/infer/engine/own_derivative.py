r"""Whether the gradient that programs have for values they read is the derivative of log w.

A program that compares, rounds or detaches what it makes of a value has a log w that jumps, or that moves while
its gradient does not. The mean of that gradient is then not the gradient of the mean, and nothing in a single draw
shows it. On a straight line from one value x to another it does show:

.. math::
    \int_0^t (x' - x) \cdot \nabla \log w(x + s (x' - x)) \, ds \ne \log w(x + t (x' - x)) - \log w(x)

The step in which the two differ most is halved again and again: what is steep becomes smooth, and a jump stays as
high as it is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.running import looking

STEPS = 16  # at first
MOST_RUNS = 200
SHORTEST = 2.0**-44
JUMP = 1e-3  # nats in one step
OF_THE_WAY = 1e-4  # that log w moves, in one step
OF_THE_WHOLE_WAY = 0.02
ROUNDING = 32  # units in the last place of log w


class Line(NamedTuple):
    """A straight line of values of one site, and how what belongs to its elements is summed by datapoint."""

    start: Tensor
    end: Tensor
    by_datapoint: Callable[[Tensor], Float[Tensor, "K B"]]

    def at(self, t: float) -> Tensor:
        """Values after a part t of the way."""
        return self.start * (1 - t) + self.end * t  # exact near both ends, as lerp is not


Lines = Mapping[str, Line]  # by the name of the site
LogW = Callable[[Mapping[str, Tensor]], Float[Tensor, "K B"]]


class Gap(NamedTuple):
    """How far log w moves on a part of the way, and how far its gradient says."""

    moved: float
    expected: float


class Point(NamedTuple):
    """log w at a part t of the way, and its slope there."""

    t: float
    value: Float[Tensor, "K B"]
    slope: Float[Tensor, "K B"]


def find_gap(lines: Lines, log_w: LogW) -> Gap | None:
    """Follow the lines; the widest gap over the datapoints, None where there is none.

    Args:
        lines: of all sites that move, at the same time.
        log_w: of values, by the name of the site.
    """
    with looking():
        start, again = (_point(lines, log_w, 0.0) for _ in range(2))
        rounding = ROUNDING * torch.finfo(start.value.dtype).eps
        if not torch.allclose(start.value, again.value, rounding, 0.0, equal_nan=True):
            return None  # noise of its own, or a state: nothing can be said
        points = [start, *(_point(lines, log_w, step / STEPS) for step in range(1, STEPS + 1))]
        first = way = _Way(points)
        smooth: set[float] = set()  # where the steps begin that are as steep as they are said to be
        while len(points) < MOST_RUNS:
            excess = (way.gaps.abs() - way.allowed).flatten(1).amax(1)
            excess[[i for i, point in enumerate(points[:-1]) if point.t in smooth]] = -torch.inf
            step = int(excess.argmax())
            if excess[step] <= 0:
                if way.whole_gap(first) is None:
                    return None
                step = way.widest()
            low, high = points[step].t, points[step + 1].t
            if _is_shortest(lines, low, high):
                if excess[step] <= 0:
                    break
                if not way.is_between_slopes(step):
                    return way.gap(step)
                smooth.add(low)
                continue
            insort(points, _point(lines, log_w, (low + high) / 2), key=lambda point: point.t)
            way = _Way(points)
        return way.whole_gap(first)


class _Way:
    """What log w and its slope do between points, [steps, K, B]."""

    def __init__(self, points: list[Point]) -> None:
        value, slope = torch.stack([p.value for p in points]), torch.stack([p.slope for p in points])
        t = torch.tensor([p.t for p in points], dtype=torch.float64, device=value.device)
        width = t.diff().to(value)[:, None, None]
        moved, expected = value.diff(dim=0), (slope[1:] + slope[:-1]) / 2 * width
        # Where a value is impossible, or infinitely steep, nothing can be said.
        known = torch.isfinite(moved) & torch.isfinite(expected)
        self.moved, self.expected = torch.where(known, moved, 0.0), torch.where(known, expected, 0.0)
        self.gaps = self.moved - self.expected
        self.by_slopes = torch.stack([slope[:-1] * width, slope[1:] * width])
        self.length = torch.maximum(self.moved.abs().sum(0), self.expected.abs().sum(0))
        largest = torch.where(value.isfinite(), value, 0.0).abs().amax(0)
        self.rounding = ROUNDING * torch.finfo(value.dtype).eps * largest
        self.allowed = JUMP + OF_THE_WAY * self.length + self.rounding

    def gap(self, step: int) -> Gap:
        """The widest of one step."""
        worst = int(self.gaps[step].abs().argmax())
        return Gap(self.moved[step].flatten()[worst].item(), self.expected[step].flatten()[worst].item())

    def widest(self) -> int:
        """The step with the widest gap."""
        return int(self.gaps.abs().flatten(1).amax(1).argmax())

    def is_between_slopes(self, step: int) -> bool:
        """Tell whether log w moves as far as a slope between those at the ends of a step says."""
        low, high = self.by_slopes[:, step].amin(0), self.by_slopes[:, step].amax(0)
        moved = self.moved[step]
        return bool(((moved >= low - self.allowed) & (moved <= high + self.allowed)).all())

    def whole_gap(self, first: _Way) -> Gap | None:
        """What has gathered since the start; steps that are only too wide had gathered more at first."""
        together, before = (way.gaps.cumsum(0).abs().amax(0) for way in (self, first))
        off = together - (JUMP + OF_THE_WHOLE_WAY * self.length + self.rounding)
        off = torch.where(together > before / 2, off, -torch.inf)
        worst = int(off.argmax())
        if off.flatten()[worst] <= 0:
            return None
        where = int(self.gaps.cumsum(0).flatten(1)[:, worst].abs().argmax())
        moved, expected = (part.cumsum(0).flatten(1)[where, worst].item() for part in (self.moved, self.expected))
        return Gap(moved, expected)


def _point(lines: Lines, log_w: LogW, t: float) -> Point:
    at = {name: line.at(t).requires_grad_() for name, line in lines.items()}
    # The same noise each time, also of what draws by other means than a site, such as a dropout.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        value = log_w(at)
        slope = torch.zeros_like(value)
        if value.requires_grad:
            found = torch.autograd.grad(value.sum(), list(at.values()), allow_unused=True)
            for line, gradient in zip(lines.values(), found, strict=True):
                if gradient is not None:
                    slope = slope + line.by_datapoint(gradient * (line.end - line.start))
    return Point(t, value.detach(), slope.detach())


def _is_shortest(lines: Lines, low: float, high: float) -> bool:
    """Tell whether there is nothing between two points."""
    middle = (low + high) / 2
    same = (all(torch.equal(line.at(middle), line.at(end)) for line in lines.values()) for end in (low, high))
    return high - low < SHORTEST or any(same)
