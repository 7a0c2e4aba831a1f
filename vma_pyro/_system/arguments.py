"""Arguments of a model and its guide, where some go by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What a method `prepare` of a guide may return to keep the arguments that were given by name."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
