r"""Whether the gradient that programs have for the weights they read is the derivative of log w.

A program that compares, rounds or detaches what it makes of weights has a log w that jumps, or that moves while
its gradient does not. The mean of that gradient is then not the gradient of the mean, and nothing in a single draw
shows it. On a straight line of weights from one value x to another it does show:

.. math::
    \int_0^t (x' - x) \cdot \nabla \log w(x + s (x' - x)) \, ds \ne \log w(x + t (x' - x)) - \log w(x)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine.first_look import is_recorded, owner_of, undisturbed
from vma_pyro.infer.engine.programs import Programs

STEPS = (32, 256)  # the second where the first is too coarse to tell
TOLERANCE = 0.02  # of how far log w moves on the way
ROUNDING = 1e-4  # of the largest log w


class Line(NamedTuple):
    """A straight line of weights of one site, and how what belongs to its elements is gathered by datapoint."""

    start: Tensor
    end: Tensor
    by_datapoint: Callable[[Tensor], Float[Tensor, "K B N"]]

    def at(self, t: float) -> Tensor:
        """Weights after a part t of the way."""
        return torch.lerp(self.start, self.end, t)


Lines = Mapping[str, Line]  # by the name of the site
LogW = Callable[[Mapping[str, Tensor]], Float[Tensor, "K B"]]


class OwnDerivative:
    """Looks along a line once for each pair of programs, as they are when they are met first."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()

    @not_compiled
    def check(self, programs: Programs, lines: Callable[[], Lines], log_w: LogW, what: str) -> None:
        """Refuse programs whose gradient is not the derivative of log w.

        Args:
            programs: the pair, which is not looked at again.
            lines: draws them, where they are wanted.
            log_w: of weights, by the name of the site.
            what: the estimator's name, for the error.

        Raises:
            ValueError: on some datapoint's line the two differ.
        """
        if is_recorded():  # what is recorded is run as well, and looked at then
            return
        owner, how = owner_of(programs.model)
        guide_owner, guide_how = owner_of(programs.guide)
        known: set[Any] = set()
        key: Any = None
        with suppress(TypeError):  # a callable without weak references is looked at each time
            key = (how, weakref.ref(guide_owner), guide_how)
            known = self._known.setdefault(owner, known)
        if key in known:
            return
        with undisturbed(programs.model, programs.guide):
            drawn = lines()
            for steps in STEPS:
                moved, expected, allowed = _along(drawn, log_w, steps)
                off = (moved - expected).abs() - allowed
                if not bool((off > 0).any()):
                    known.add(key)
                    return
        worst = int(off.argmax())
        raise ValueError(
            f"site '{next(iter(drawn))}': expected log w with its own derivative in the weights, as {what} needs, "
            f"got {moved.flatten()[worst]:.3g} nats on the way to another value where the gradient says "
            f"{expected.flatten()[worst]:.3g}: the program compares, rounds or detaches what it makes of them; "
            "use RLOO, or RELAX(reads_softly=False)"
        )


look_along = OwnDerivative()


def _along(lines: Lines, log_w: LogW, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the lines: how far log w has moved [steps, K, B], how far by its gradient, what may lie between."""
    values, slopes = [], []
    for step in range(steps + 1):
        at = {name: line.at(step / steps).requires_grad_() for name, line in lines.items()}
        # The same noise each time, also of what draws by other means than a site, such as a dropout.
        torch.manual_seed(0)
        with torch.enable_grad():
            value = log_w(at)
            found = torch.autograd.grad(value.sum(), list(at.values()), allow_unused=True)
        slope = torch.zeros_like(value)
        for line, gradient in zip(lines.values(), found, strict=True):
            if gradient is not None:
                slope = slope + line.by_datapoint(gradient * (line.end - line.start)).sum(-1)
        values.append(value.detach())
        slopes.append(slope)
    value, slope = torch.stack(values), torch.stack(slopes) / steps
    moved = value[1:] - value[0]
    expected = ((slope[1:] + slope[:-1]) / 2).cumsum(0)
    # Where a value is impossible nothing can be said.
    expected = torch.where(torch.isfinite(moved - expected), expected, moved)
    way = torch.maximum(slope.abs().sum(0), value.diff(dim=0).abs().sum(0))
    return moved, expected, (TOLERANCE * way + ROUNDING * value.abs().amax(0)).nan_to_num(0.0)
