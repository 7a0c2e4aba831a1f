"""How parameters, their gradients and what optimizers keep of them lie in memory.

Fused optimizers walk through raw memory and look at no strides. A backward pass leaves each gradient as its
parameter lies, in memory of its own; whoever sets gradients or the optimizer's state has to do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_parameters(module: nn.Module) -> None:
    """Refuse parameters that a fused optimizer would move in part, or not at all.

    Raises:
        ValueError: one that requires a gradient and is complex, or has gaps or repetitions in memory.
    """
    for name, p in module.named_parameters():
        if p.requires_grad and not p.is_floating_point():
            raise ValueError(f"{name}: expected a parameter of real numbers, got {p.dtype}")
        if p.requires_grad and not lies_alike(p, torch.empty_like(p)):
            raise ValueError(
                f"{name}: expected a parameter without gaps or repetitions in memory, got shape {list(p.shape)} "
                f"with strides {list(p.stride())}; give nn.Parameter(value.contiguous())"
            )


def lies_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape have their elements in the same order in memory."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return one.numel() == 0 or all(mine == theirs for size, mine, theirs in strides if size > 1)


def laid_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The value in the order of the parameter's elements; itself, if it has that already."""
    return value if lies_alike(parameter, value) else torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lay_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring what an optimizer keeps of each parameter into its order: files may come from other layouts."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = laid_like(parameter, value)
