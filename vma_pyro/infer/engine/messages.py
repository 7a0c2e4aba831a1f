"""What effect handlers ask about a sample site, and how they decide on its value.

The handlers of this package stand outside the particle plate, so that a site's distribution has all its plate
dimensions when they see it. Sites whose value is already decided (observed, replayed, conditioned) are left alone.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions import MaskedDistribution
from torch import Tensor

Message = Any  # what Pyro passes to handlers at a site


def is_drawn(msg: Message) -> bool:
    """Tell whether this site, after it has run, has a random value of its own."""
    return (
        not msg["is_observed"]
        and hasattr(msg["fn"], "batch_shape")
        and not msg["infer"].get("_deterministic")
        and type(msg["fn"]).__name__ != "_Subsample"
    )


def is_open(msg: Message) -> bool:
    """Tell whether this site still waits for a random value."""
    return not msg["done"] and msg["value"] is None and is_drawn(msg)


def decide(msg: Message, value: Tensor) -> None:
    """Give the site its value; handlers further out and Pyro's own sampling then leave it."""
    msg["value"], msg["done"] = value, True


def check_finite_support(msg: Message, purpose: str = "") -> None:
    """Refuse a site whose values cannot be listed, or whose probabilities a mask of its own hides."""
    if not getattr(msg["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"site '{msg['name']}': expected a finite support{purpose}, got {type(msg['fn']).__name__}"
        )
    check_no_own_mask(msg)


def check_no_own_mask(msg: Message) -> None:
    """Refuse `fn.mask(...)`, whose log_prob is not the probability of drawing; a mask handler is fine."""
    if isinstance(msg["fn"], MaskedDistribution):
        raise ValueError(
            f"site '{msg['name']}': expected its mask from poutine.mask, as its values are chosen, "
            "got a masked distribution"
        )
