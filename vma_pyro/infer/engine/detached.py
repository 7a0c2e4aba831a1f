"""Draws without a gradient through their values."""

from __future__ import annotations

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import innermost
from vma_pyro.infer.engine.messages import Message, decide, is_open


class DetachValues(Messenger):
    """Draw every site without a gradient through its value, as wake-sleep needs."""

    def _pyro_sample(self, msg: Message) -> None:
        if is_open(msg):
            _check_density(msg)
            with torch.no_grad():
                value = msg["fn"](*msg["args"], **msg["kwargs"])
            decide(msg, _forgotten(msg, value))


def _check_density(msg: Message) -> None:
    """A point whose place is learned has no density that could learn it."""
    base = innermost(msg["fn"])
    if isinstance(base, Delta) and (base.v.requires_grad or base.log_density.requires_grad):
        raise ValueError(
            f"site '{msg['name']}': expected a density where samples are held fixed, got Delta, whose parameters "
            "would learn nothing; use an objective that differentiates through draws, such as MultiSampleELBO"
        )


def _forgotten(msg: Message, value: Tensor) -> Tensor:
    """A drawn value that the distribution takes for any other.

    A flow that remembers its draws (`cache_size`) hands back what it had without a gradient, and log q would have
    none in its parameters: it has to go the way from the value to the noise again.
    """
    base = innermost(msg["fn"], through_transforms=False)
    if not hasattr(base, "transforms"):
        return value
    copied = value.clone()
    if hasattr(value, "_unquantize"):  # a straight-through draw carries the soft one that its density is of
        copied._unquantize = value._unquantize.clone()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            msg["fn"].log_prob(copied)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"site '{msg['name']}': expected a density at any value where samples are held fixed, "
            f"got {type(base).__name__} with a transform that has no inverse"
        ) from error
    return copied.clone() if not hasattr(value, "_unquantize") else copied
