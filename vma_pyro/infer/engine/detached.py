"""Drawing without a gradient through the values."""

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
    """Refuse a point whose place is learned: it has no density that could learn it."""
    base = innermost(msg["fn"])
    if isinstance(base, Delta) and (base.v.requires_grad or base.log_density.requires_grad):
        raise ValueError(
            f"site '{msg['name']}': expected a density where samples are held fixed, got Delta, whose parameters "
            "would learn nothing; use an objective that differentiates through draws, such as MultiSampleELBO"
        )


def _forgotten(msg: Message, value: Tensor) -> Tensor:
    """Copy a drawn value, so that the distribution takes it for any other.

    A flow that remembers its draws (`cache_size`) hands back the noise without a gradient, and log q would have
    none in its parameters: it must go from the value to the noise again.
    """
    base = innermost(msg["fn"], through_transforms=False)
    if not hasattr(base, "transforms"):
        return value
    copied = value.clone()
    if hasattr(value, "_unquantize"):  # a straight-through draw carries the soft one, whose density counts
        copied._unquantize = value._unquantize.clone()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            msg["fn"].log_prob(copied)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"site '{msg['name']}': expected a density at any value where samples are held fixed, "
            f"got {type(base).__name__} with a transform that has no inverse"
        ) from error
    return copied if hasattr(value, "_unquantize") else copied.clone()
