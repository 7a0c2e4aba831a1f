"""An update's gradient, recorded once and replayed without Pyro's effect handlers, which cost as much as it does.

What an estimator remembers of earlier draws (buffers) is an input of what is recorded, and changed in place as by
the program. Replays are compared with the program, on the same noise, at the first, second, fourth, ... and every
thousandth; at the first difference they end for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from vma_pyro.training.recording import reason, record

WAIT = 50  # updates before one is recorded, which takes about a second
CHECK_EVERY = 1000
TOLERANCE = 1e-6  # relative to the largest entry; they are expected to be equal


class Gradient(NamedTuple):
    """Minus the bound, mean over images, and its gradient by parameter; None where one plays no part."""

    loss: Float[Tensor, ""]
    of: tuple[Tensor | None, ...]


class Recorded:
    """The gradient of a loss of images; see the top of the file.

    Args:
        loss_fn: module of images [B, pixels], a scalar summed over them; `elbo(model, guide)`.
        note: told in one line why there are no replays, once.
        wait: calls before one is recorded.
    """

    def __init__(self, loss_fn: nn.Module, *, note: Callable[[str], object] = print, wait: int = WAIT) -> None:
        self.loss_fn, self.note, self.wait = loss_fn, note, wait
        self.parameters = {name: p for name, p in loss_fn.named_parameters() if p.requires_grad}
        self.buffers = dict(loss_fn.named_buffers())
        self.possible, self.replays = True, 0
        self._graph: Any = None

    def gradient(self, x: Float[Tensor, "B P"]) -> Float[Tensor, ""]:
        """Compute the loss per image; leaves its gradient in the parameters."""
        self.wait -= 1
        found = self._replayed(x) if self.possible and self.wait < 0 else self._run(x)
        for parameter, gradient in zip(self.parameters.values(), found.of, strict=True):
            # The fused optimizer goes through both in the order of memory.
            same = gradient is None or gradient.stride() == parameter.stride()
            parameter.grad = gradient if same else gradient.contiguous()  # type: ignore[union-attr]
        return found.loss

    def _run(self, x: Tensor) -> Gradient:
        """Run the program itself."""
        loss = self.loss_fn(x) / len(x)
        of = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return Gradient(loss.detach(), of)

    def _replayed(self, x: Tensor) -> Gradient:
        if self._graph is None:
            try:
                self._graph = self._record(x)
            except Exception as error:  # whatever a program may raise; it is run as usual, and raises it there
                return self._give_up(self._run(x), f"the program cannot be recorded: {reason(error)}")
        self.replays += 1
        checked = self.replays & (self.replays - 1) == 0 or self.replays % CHECK_EVERY == 0
        noise, before = torch.get_rng_state(), self._remembered() if checked else {}
        with torch.no_grad():
            found = Gradient(*self._graph.forward(self.parameters, self.buffers, x))
        if checked:
            after = self._remembered()
            torch.set_rng_state(noise)
            for name, value in before.items():
                self.buffers[name].copy_(value)
            expected = self._run(x)
            same = all(_equal(after[name], value) for name, value in self.buffers.items())
            if not same or not _same(found, expected):
                return self._give_up(expected, f"replay {self.replays} differs from the program")
        return found

    def _record(self, x: Tensor) -> Any:
        def gradient(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            loss = functional_call(self.loss_fn, parameters | buffers, (x,)) / len(x)
            return loss, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

        return record(gradient, self.parameters, self._remembered(), x)

    def _remembered(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.buffers.items()}

    def _give_up(self, found: Gradient, why: str) -> Gradient:
        self.possible, self._graph = False, None
        self.note(f"replays: {why}; updates are made without them")
        return found


def _same(found: Gradient, expected: Gradient) -> bool:
    pairs = [(found.loss, expected.loss), *zip(found.of, expected.of, strict=True)]
    return all(f is e if f is None or e is None else _equal(f, e) for f, e in pairs)


def _equal(found: Tensor, expected: Tensor) -> bool:
    largest = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 0.0
    return torch.allclose(found, expected, TOLERANCE, TOLERANCE * largest, equal_nan=True)
