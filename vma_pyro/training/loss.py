"""What the training loop asks for in every update: a loss, with its gradient left in the parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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
        backward: from a scalar to the gradients in the parameters; with exchange between processes.
        autocast: in which precision the program runs forward, see `bf16`.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        *,
        note: Callable[[str], object] = print,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.loss_fn, self.note, self.autocast = loss_fn, note, autocast
        self._backward = backward

    def gradient(self, memory: Memory, x: Tensor) -> Tensor:
        """The loss (without a graph); its gradient replaces that in the parameters.

        Raises:
            ValueError: images that do not fit the memory, or are not binary; what the program itself raises.
        """
        with self.autocast():
            loss: Tensor = self.loss_fn(memory, x)
        loss = loss / len(x)
        self.loss_fn.zero_grad()
        self._backward(loss)
        return loss.detach()


def bf16(device: torch.device) -> AbstractContextManager[Any]:
    """Have layers multiply in bfloat16.

    Weights are cast at each use: a cast that several uses share would add up their gradients in bfloat16.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
