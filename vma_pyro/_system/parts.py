"""Parts of a program: modules that remember how they were made, so that a file can say how to make them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Part(nn.Module):
    """A module that remembers the arguments of its constructor, defaults included.

    A subclass need do nothing for it: its `__init__` is wrapped, and the outermost one counts.

    Attributes:
        made_with: the arguments by name, as they stand in the signature of the class.
    """

    made_with: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the constructor of a subclass note what it is given."""
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = _noting(cls.__init__)  # type: ignore[method-assign]


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that notes its arguments before it runs."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Part, *args: Any, **kwargs: Any) -> None:
        # Constructors of base classes run inside that of the class, which has noted its arguments already.
        if "made_with" not in self.__dict__:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                init(self, *args, **kwargs)  # says in Python's own words what is wrong
                raise
            bound.apply_defaults()
            _, *rest = bound.arguments.items()  # without self
            # Past `__setattr__`, which takes modules for submodules and wants `nn.Module.__init__` first.
            self.__dict__["made_with"] = dict(rest)
        init(self, *args, **kwargs)

    return __init__
