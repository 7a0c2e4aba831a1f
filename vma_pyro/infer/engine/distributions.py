"""Questions to a distribution, whatever it is wrapped in."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

# In these families alone a draw is loc + scale * noise, with noise whose law has no parameter.
LOCATION_SCALE = ("Normal", "Laplace", "Cauchy")
MOST_JOINT_VALUES = 4096  # of the elements of one site; a single element may have any number


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


def elementary(fn: Any) -> tuple[Any, int]:
    """Unwrap the distribution of single elements; returns also how many dimensions of an event they fill."""
    inner = 0
    while isinstance(fn, torch.distributions.Independent):
        inner += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, inner


def is_finite(fn: Any) -> bool:
    """Tell whether the elements of a distribution have finitely many values."""
    return bool(getattr(elementary(fn)[0], "has_enumerate_support", False))


def too_many(fn: Any) -> str:
    """Tell how many joint values the elements of a distribution have, if they are too many to list; else ""."""
    (base, inner), values = elementary(fn), len(_of_one(fn))
    number = math.prod(_elements(base, inner))
    return f"{values}^{number}" if number > 1 and values**number > MOST_JOINT_VALUES else ""


def whole_support(fn: Any) -> Tensor:
    """List all values of a distribution with finite support, [S, 1, ..., 1, *event].

    Those of several elements (`to_event`) are all combinations of theirs, the last element changing first; ask
    `too_many` before.
    """
    base, inner = elementary(fn)
    if not inner:
        return fn.enumerate_support(expand=False)
    of_one = _of_one(fn).reshape(-1, *base.event_shape)  # [V, *event of an element]
    elements = _elements(base, inner)
    shape = [len(of_one)] * math.prod(elements)
    number = torch.arange(math.prod(shape), device=of_one.device)
    joint = of_one[torch.stack(torch.unravel_index(number, shape), -1)] if shape else of_one[:0].new_empty(1, 0)
    return joint.reshape(len(number), *(1 for _ in fn.batch_shape), *elements, *base.event_shape)


def _of_one(fn: Any) -> Tensor:
    return elementary(fn)[0].enumerate_support(expand=False)


def _elements(base: Any, inner: int) -> torch.Size:
    return base.batch_shape[len(base.batch_shape) - inner :]
