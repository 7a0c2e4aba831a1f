"""What a program of another field gives, to be trained by every estimator and judged by its evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Field(NamedTuple):
    """A program with its guide, its data and what a perfect guide would reach.

    A module of programs has a function `field(*, seed=0)` that makes one; the seed is that of the data and of the
    guide's first weights.

    Attributes:
        model, guide: programs of the same arguments. Parameters are those of a module, or of `pyro.param`.
        args: the arguments of both, the data.
        batch_plates: plates whose elements are the datapoints; none: all data is one.
        site: the discrete site, or sites, of which some estimators choose the values.
        evidence: log p(data) in nats, summed over the data, of the model as it is; or a value to compare with.
        error: standard error of the evidence in nats, 0 where it is exact.
        how: how the evidence is computed, in one sentence.
        learns_model: whether the model is trained along; otherwise the guide alone.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Tensor, ...]
    batch_plates: tuple[str, ...]
    site: str | tuple[str, ...]
    evidence: float
    error: float
    how: str
    learns_model: bool
