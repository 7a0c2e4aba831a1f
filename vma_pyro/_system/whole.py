"""Numbers that count something."""

from __future__ import annotations

import operator
from typing import Any


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: it is not; the message names the argument.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
