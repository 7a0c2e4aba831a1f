"""Learning a control variate: its parameters follow the gradient of the squared gradient of the same draw.

An estimator that is unbiased for all of them has its least variance where the expected square is least.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.infer.engine.weights import finite


def learned(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """List the parameters of those in training mode."""
    return [p for part in parts if part.training for p in part.parameters() if p.requires_grad]


def ascent_of_minus(square: Float[Tensor, ""], parameters: list[nn.Parameter]) -> Float[Tensor, ""]:
    """Make a surrogate that has minus the gradient of a square in these parameters, and none in any other."""
    surrogate = square.detach().new_zeros(())
    if not (square.requires_grad and parameters):
        return surrogate
    gradients = torch.autograd.grad(square, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            surrogate = surrogate - (finite(gradient) * parameter).sum().to(surrogate)
    return surrogate
