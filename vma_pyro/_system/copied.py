"""Copies of modules, whatever they remember of their last run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
DEPTH = 4  # of containers and objects in each other


def copied(module: Module) -> Module:
    """A deep copy in which values with a gradient's history are plain values: torch refuses to copy such.

    A transform with a cache (a flow of Pyro's) keeps its last input and output, a layer perhaps its last norm.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in _computed(vars(part), DEPTH):
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _computed(value: Any, depth: int) -> Iterator[Tensor]:
    """Find the tensors that are no leaves of a graph, within containers and plain objects."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _computed(item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from _computed(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _computed(vars(value), depth - 1)
