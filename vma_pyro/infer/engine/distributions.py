"""Questions to a distribution, whatever it is wrapped in."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

# In these families alone a draw is loc + scale * noise, with noise whose law has no parameter.
LOCATION_SCALE = ("Normal", "Laplace", "Cauchy")


def is_location_scale(fn: Any) -> bool:
    """Tell whether a distribution is of one of these families itself, and of no class derived from them."""
    name = type(fn).__name__
    families = (getattr(torch.distributions, name, None), getattr(pyro.distributions, name, None))
    return name in LOCATION_SCALE and type(fn) in families


def innermost(fn: Any, *, through_transforms: bool = True) -> Any:
    """Unwrap a masked, expanded or independent distribution; with `through_transforms` a transformed one, too."""
    while hasattr(fn, "base_dist") and (through_transforms or not hasattr(fn, "transforms")):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Tell whether a distribution is a `Delta`."""
    return isinstance(innermost(fn), Delta)


def whole_support(fn: Any) -> Tensor:
    """List all values of a distribution with finite support, [S, 1, ..., 1, *event]."""
    return fn.enumerate_support(expand=False)
