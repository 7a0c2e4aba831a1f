"""What the training loop asks for in every update: a loss, with its gradient left in the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vma_pyro.memory import Memory


class Loss:
    """Minus a bound per image, and its gradient by a backward pass through the program.

    Attributes:
        loss_fn: see below.
        note: told in one line of what the user may want to know, by losses that have something to say.

    Args:
        loss_fn: module of (memory, x), a scalar summed over images; `elbo(model, guide)`.
        note: see above.
        backward: from a scalar to the gradients in the parameters; with scaling or exchange between processes.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        *,
        note: Callable[[str], object] = print,
        backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        self.loss_fn, self.note = loss_fn, note
        self._backward = backward

    def gradient(self, memory: Memory, x: Tensor) -> Tensor:
        """The loss (without a graph); its gradient replaces that in the parameters.

        Raises:
            ValueError: images that do not fit the memory, or are not binary; what the program itself raises.
        """
        loss: Tensor = self.loss_fn(memory, x) / len(x)
        self.loss_fn.zero_grad()
        self._backward(loss)
        return loss.detach()
