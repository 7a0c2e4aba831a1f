"""What programs hold besides parameters, outlined: two outlines differ where what they are of has changed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

ITEMS = 64  # of a container that are looked at
DEPTH = 3  # of containers in containers


class Outline(NamedTuple):
    """Outlines values: hashable, and the same for what is equal.

    Numbers, texts, arrays, and what containers (their first 64 items) and plain objects hold, to a depth of 3.

    Attributes:
        of_tensor: outlines a tensor.
        of_function: outlines a function.
    """

    of_tensor: Callable[[Tensor], Any]
    of_function: Callable[[Any], Any]

    def of(self, value: Any, depth: int = DEPTH) -> Any:
        """Outline a value."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return kind, repr(value)  # NaN is itself, and -0 is not 0
        if isinstance(value, Tensor):
            return kind, self.of_tensor(value)
        if isinstance(value, np.ndarray):
            return kind, value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()
        if isinstance(value, FunctionType | MethodType | BuiltinFunctionType):
            return self.of_function(value)
        if not depth or isinstance(value, nn.Module | type):
            return kind
        return kind, tuple(self._parts(value, depth - 1))

    def _parts(self, value: Any, depth: int) -> Iterator[Any]:
        if isinstance(value, Mapping):
            yield from (self.of(item, depth) for item in islice(value.items(), ITEMS))
        elif isinstance(value, set | frozenset):
            yield from sorted((self.of(item, depth) for item in islice(value, ITEMS)), key=repr)
        elif isinstance(value, list | tuple):
            yield from (self.of(item, depth) for item in islice(value, ITEMS))
        elif isinstance(value, functools.partial):
            yield from (self.of(part, depth) for part in (value.func, value.args, value.keywords))
        else:
            for name, item in _attributes(value):
                yield name, self.of(item, depth)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What a plain object holds, under the names in its class's slots too."""
    yield from vars(value).items() if hasattr(value, "__dict__") else ()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


@functools.cache
def names_of_modules() -> frozenset[str]:
    """Attributes that every module has of torch and Pyro, which programs do not compute with."""
    from pyro.nn import PyroModule  # not before it is wanted: a memory knows no Pyro

    return frozenset(vars(PyroModule())) - {"training"}
