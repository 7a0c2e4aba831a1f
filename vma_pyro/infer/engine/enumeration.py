"""Enumerating the values of a discrete site: all of them, or some, in a dimension of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.messages import Message, check_finite_support, decide, is_open

Values = Callable[[Any], Tensor]  # from a distribution to some of its values


class EnumerateValues(Messenger):
    """Give one site several values, in a new dimension left of the particles'.

    Args:
        site: its name.
        values: from the site's distribution, of batch shape [K, plates], to values [S, *batch, *event], where
            batch broadcasts to the distribution's.
        dims: number of dimensions right of the new one: plates, particles, and those of sites enumerated later.
    """

    def __init__(self, site: str, values: Values, dims: int) -> None:
        self.site, self.values, self.dims = site, values, dims

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] == self.site and is_open(msg):
            check_finite_support(msg, " to choose values from")
            try:
                value = self.values(msg["fn"])
            except NotImplementedError as error:  # a Binomial with a total count for each datapoint
                raise ValueError(
                    f"site '{self.site}': expected a finite support, the same for all datapoints, got "
                    f"{type(msg['fn']).__name__} whose support cannot be enumerated"
                ) from error
            shape = value.shape[: value.dim() - msg["fn"].event_dim]
            event = value.shape[len(shape) :]
            padding = (1,) * (self.dims + 1 - len(shape))
            decide(msg, value.reshape(shape[0], *padding, *shape[1:], *event))


def fixed(values: Tensor) -> Values:
    """Give every particle and datapoint the same values [S]."""
    return lambda fn: values
