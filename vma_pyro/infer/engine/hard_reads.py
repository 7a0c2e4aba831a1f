"""What programs round or compare: seen, and of weights over the values of a site refused; `paths` sees draws."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vma_pyro.infer.engine.checks import is_function_of

ROUNDING = (
    *("round", "floor", "ceil", "trunc", "frac", "remainder", "fmod", "sign", "sgn", "signbit"),
    *("argmax", "argmin", "argsort", "logical_not", "bucketize", "searchsorted", "histc"),
)
NUMBERS = ("item", "tolist", "float", "int", "bool", "index")  # of Python
CASTS = ("long", "int", "short", "byte", "bool", "to", "type", "type_as")
COMPARISONS = (
    *("eq", "ne", "gt", "ge", "lt", "le", "isclose", "logical_and", "logical_or"),
    *("threshold", "hardshrink"),
)


class Reads(TorchFunctionMode):
    """Meets all that is rounded or compared while it is entered, but for what distributions ask about support.

    The position of the largest value is a rounding once it is used.
    """

    through_copies = False  # whether a copy without a gradient is looked at as what it is a copy of

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[Tensor, tuple[str, Tensor]] = {}  # what found them, and in what
        self.copies: dict[Tensor, Tensor] = {}  # without a gradient, and of what

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and look at it."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "detach" or getattr(func, "__self__", None) is Tensor.data:
            self.copies[result] = reads[0]
        is_tensor = isinstance(result, Tensor)
        rounds = name in ROUNDING or (name in CASTS and is_tensor and not _is_floating(result))
        rounds = rounds or (name in NUMBERS and not is_tensor)
        if (rounds or name in COMPARISONS) and not _is_validation():
            for read in reads:
                self.met(name, self.copies.get(read, read) if self.through_copies else read, rounds=rounds)
        for read in reads:
            for positions, (operation, of) in self.positions.items():
                if read is positions and name != "get":  # an attribute
                    self.met(operation, of, rounds=True)
        if isinstance(result, tuple) and reads:  # such as the largest values, and where they were
            found = (r for r in result if isinstance(r, Tensor) and not _is_floating(r))
            self.positions |= dict.fromkeys(found, (name, reads[0]))
        return result

    @abstractmethod
    def met(self, operation: str, read: Tensor, *, rounds: bool) -> None:
        """Look at a tensor that is rounded or compared."""


class HardReads(Reads):
    """Refuses to round what depends on weights, and to compare them themselves, or a part of them.

    A rounding has no gradient, and what a program makes of rounded weights says nothing of other weights.

    Args:
        weights: by the name of the site; more may be added on the way.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def met(self, operation: str, read: Tensor, *, rounds: bool) -> None:
        """Refuse it if it is made of weights."""
        for name, weights in self.weights.items():
            base = read._base
            same = read is weights or (base is not None and (base is weights or base is weights._base))
            if same or (rounds and read.requires_grad and is_function_of(read, weights)):
                raise ValueError(
                    f"site '{name}': expected a program that reads its weights as numbers, with a gradient, got "
                    f"one that rounds or compares them ({operation})"
                )


def _is_floating(result: Any) -> bool:
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())


def _is_validation() -> bool:
    """Tell whether a distribution asks whether its parameters or values are in their support."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame.f_globals.get("__name__", "").endswith("distributions.constraints"):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
