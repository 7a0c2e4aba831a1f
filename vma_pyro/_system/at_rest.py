"""Programs in evaluation mode for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
