"""Programs in evaluation mode for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def at_rest(*programs: Any) -> Iterator[None]:
    """Have all modules of some programs in evaluation mode, and each in its own mode again afterwards."""
    training = [m for p in programs if isinstance(p, nn.Module) for m in p.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def met_at_rest() -> Iterator[None]:
    """Have the modules that run in evaluation mode, whatever holds them: a function may, and name it to Pyro."""
    met: list[nn.Module] = []

    def rest(module: nn.Module, _: Any) -> None:
        if module.training:
            met.append(module)
            module.training = False

    hook = register_module_forward_pre_hook(rest)
    try:
        yield
    finally:
        hook.remove()
        for module in met:
            module.training = True
