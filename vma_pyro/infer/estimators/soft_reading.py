"""Running programs on weights over the values of discrete sites, with a gradient all the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vma_pyro.infer.engine.checks import is_function_of
from vma_pyro.infer.engine.handlers import Message
from vma_pyro.infer.estimators.relaxed import Relax

ROUNDING = ("round", "floor", "ceil", "trunc", "sign", "argmax")
CASTS = ("long", "int", "short", "byte", "bool", "to", "type", "type_as")
COMPARISONS = ("eq", "ne", "gt", "ge", "lt", "le")


class Soften(Relax):
    """Give discrete sites weights over their values, in guide and model, and watch what programs make of them.

    A program that rounds weights, or compares them with a number, is not continuous in them: the mean of its
    gradient is not the gradient of its mean. It is refused, where that is seen.

    Args:
        weights: by the name of the site, [K, *elements] of bits and [K, *elements, S] of others.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(tuple(weights), 1.0, lambda log_q, _: log_q)  # nothing is drawn
        self.weights = weights
        self.watch = _Watch(weights)

    def __enter__(self) -> Any:
        # Parameters were looked at in the run on values; here looking would be a comparison of the program's.
        self.stack = ExitStack()
        self.stack.enter_context(dist.validation_enabled(False))
        self.stack.enter_context(self.watch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def _pyro_sample(self, msg: Message) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.weights and not msg["is_observed"]:
            msg["value"] = self.weights[msg["name"]]  # plates outside still expand the distribution


class _Watch(TorchFunctionMode):
    """Looks at what is done with weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        rounds = name in ROUNDING or (name in CASTS and not _is_floating(result))
        if (rounds or name in COMPARISONS) and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            self._check(name, args[0], rounds)
        return result

    def _check(self, operation: str, read: Tensor, rounds: bool) -> None:
        """Refuse to round what depends on weights, and to compare them themselves, or a part of them."""
        for name, weights in self.weights.items():
            same = read is weights or read._base is weights
            if same or (rounds and is_function_of(read, weights)):
                raise ValueError(
                    f"site '{name}': expected a program that reads its weights as numbers, with a gradient, got "
                    f"one that rounds or compares them ({operation})"
                )


def _is_floating(result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_floating_point()
