"""Running programs on weights over the values of discrete sites, with a gradient all the way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from vma_pyro.infer.engine.handlers import Message
from vma_pyro.infer.engine.hard_reads import HardReads
from vma_pyro.infer.estimators.relaxed import Relax


class Soften(Relax):
    """Give discrete sites weights over their values, in guide and model, and watch what programs make of them.

    A program that rounds weights, or compares them with a number, is not continuous in them: the mean of its
    gradient is not the gradient of its mean. It is refused, where that is seen.

    Args:
        weights: by the name of the site, [K, *elements] of bits and [K, *elements, S] of others.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(tuple(weights), 1.0, lambda log_q, _: log_q)  # nothing is drawn
        self.weights = dict(weights)
        self.watch = HardReads(weights)

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
