"""What a distribution is, whatever it is wrapped in."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

# Exactly these: a draw is loc + scale * noise, and no parameter decides on the law of the noise.
LOCATION_SCALE = ("Normal", "Laplace", "Cauchy")


def is_location_scale(fn: Any) -> bool:
    """Whether a distribution is one of these families itself, and no class derived from them."""
    name = type(fn).__name__
    families = (getattr(torch.distributions, name, None), getattr(pyro.distributions, name, None))
    return name in LOCATION_SCALE and type(fn) in families


def innermost(fn: Any, *, through_transforms: bool = True) -> Any:
    """The distribution within those that only wrap one: masked, expanded, independent, transformed.

    Args:
        fn: a distribution.
        through_transforms: whether to look into a transformed distribution as well.
    """
    while hasattr(fn, "base_dist") and (through_transforms or not hasattr(fn, "transforms")):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether a distribution is a `Delta`, whatever it is wrapped in."""
    return isinstance(innermost(fn), Delta)


def whole_support(fn: Any) -> Tensor:
    """All values of a distribution with finite support [S, 1, ..., 1, *event]."""
    return fn.enumerate_support(expand=False)
