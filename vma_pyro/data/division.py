"""Classes divided at random, or by name, into disjoint parts."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from vma_pyro._system.whole import check_whole
from vma_pyro.data.records import ImageClasses

Share = float | Collection[str]


class Split(NamedTuple):
    """Holds disjoint classes: no group (alphabet) is in two of them."""

    train: ImageClasses
    validation: ImageClasses
    test: ImageClasses


def divide(
    data: ImageClasses,
    *,
    test: Share = 0.25,
    validation: Share = 0.2,
    by: Literal["group", "class"] = "group",
    seed: int = 0,
) -> Split:
    """Divide classes at random, or by name; each part has a class with 2 images or more, of which one is a query.

    Args:
        data: all classes.
        test: share of all groups (or classes) that is kept for the test, or their names.
        validation: share of the rest that validates, or their names.
        by: what is never cut through: groups, or classes alone. Where several groups have classes of one name,
            these are named "group/name".
        seed: of the random choice.

    Raises:
        ValueError: too few groups, unknown names, or names in two parts.
    """
    check_whole("seed", seed, least=0)
    if by not in ("group", "class"):
        raise ValueError(f"by: expected 'group' or 'class', got {by!r}")
    unique = len(set(data.names)) == len(data.names)
    of = data.groups if by == "group" else data.names if unique else data.full_names
    # Units that offer a query come first: every part needs one.
    several = {unit for unit, count in zip(of, data.counts, strict=True) if count > 1}
    units = sorted(set(of))
    if len(several) < 3:
        what = "groups (a class in no folder of a group is one)" if by == "group" else "classes"
        raise ValueError(
            f"data: expected 3 {what} or more with a class of 2 images or more, for training, validation and "
            f"test, got {len(several)}"
        )
    order = [units[i] for i in np.random.default_rng(seed).permutation(len(units))]
    named = _named("validation", validation, order)
    both = set(named).intersection(_named("test", test, order))
    if both:
        raise ValueError(
            f"validation: expected other names than of the test, got {', '.join(sorted(both))} in both"
        )
    tested = _chosen("test", test, [unit for unit in order if unit not in named], several, spare=1 if named else 2)
    rest = [unit for unit in order if unit not in tested]
    held_out = named or _chosen("validation", validation, rest, several, spare=1)
    parts = {"train": [unit for unit in rest if unit not in held_out], "validation": held_out, "test": tested}
    rows = {}
    for name, part in parts.items():
        if not several.intersection(part):
            raise ValueError(f"{name}: expected a {by} with a class of 2 images or more, got {len(part)} without")
        rows[name] = [i for i, unit in enumerate(of) if unit in set(part)]
    return Split(*(data.of_classes(rows[name]) for name in ("train", "validation", "test")))


def _named(name: str, share: Share, order: list[str]) -> list[str]:
    """The units that are given by their names, in order; none of a share."""
    if isinstance(share, Real):
        if not 0 < float(share) < 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, or names, got {share}")
        return []
    names: Any = share
    wanted = {names} if isinstance(names, str) else set(names)
    unknown = wanted - set(order)
    if unknown or not wanted:
        raise ValueError(f"{name}: expected some of {', '.join(order)}, got {sorted(map(str, unknown))}")
    return [unit for unit in order if unit in wanted]


def _chosen(name: str, share: Share, order: list[str], several: set[str], *, spare: int) -> list[str]:
    """The units of a part: those named, or a share of those in order, which has a query and leaves some."""
    named = _named(name, share, order)
    if named or not isinstance(share, Real):
        return named
    left = len(several.intersection(order)) - 1
    if left < spare:
        raise ValueError(
            f"{name}: expected {spare + 1} or more with a class of 2 images to choose from, got {left + 1}"
        )
    number = min(max(1, math.floor(float(share) * len(order) + 0.5)), len(order) - spare)
    chosen = [next(unit for unit in order if unit in several)]
    for unit in order:
        if len(chosen) == number:
            break
        if unit != chosen[0] and (unit not in several or left > spare):
            chosen.append(unit)
            left -= unit in several
    return chosen
