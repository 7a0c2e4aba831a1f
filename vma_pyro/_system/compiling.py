"""Keeping functions out of what `torch.compile` makes, without importing the compiler for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function run as it is under `torch.compile`, as `torch.compiler.disable` does.

    That imports the compiler, which takes longer than all of Pyro; here it happens once something else has.
    """
    found: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not found:
            found.append(torch.compiler.disable(function))
        return found[0](*args, **kwargs)

    return call
