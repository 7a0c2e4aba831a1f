"""Numbers that count something."""

from __future__ import annotations

import operator
from typing import Any


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no int of at least `least`.

    Raises:
        ValueError: it is not; the message names the argument.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name}: expected an int, got {value}")
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
