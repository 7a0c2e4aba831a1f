"""Disjoint classes to train on, to select models with, and to test with once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vma_pyro._system.whole import check_whole
from vma_pyro.data import folder, glyphs, labelled, omniglot
from vma_pyro.data.records import ImageClasses

DATA_SETS = ("glyphs", "omniglot", "omniglot-45", *labelled.NAMES, "folder")


class Split(NamedTuple):
    """Holds disjoint classes: no group (alphabet) is in two of them."""

    train: ImageClasses
    validation: ImageClasses
    test: ImageClasses


def load_split(data: str, root: str | Path | None = None, **preparation: Any) -> Split:
    """Load the classes of a data set.

    Args:
        data: "glyphs" (procedural), "omniglot" (the canonical split: 30 background alphabets, of which 3 validate;
            20 test), "omniglot-45" (the split of figures 3 to 5 of the paper: 45 alphabets, of which the same 3
            validate; 5 test), one of torchvision's sets of labelled images (`labelled.NAMES`), or "folder" (your
            own images); the last two kinds are divided at random, by the seed 0.
        root: folder of the data, as for `omniglot.load`; of your own images itself; glyphs need none.
        preparation: of images of your own and of torchvision's, see `folder.load` and `labelled.load`.

    Raises:
        ValueError: another name, or a file that is damaged.
        FileNotFoundError: no data, and downloading failed.
    """
    if data == "folder":
        if root is None:
            raise ValueError("data_dir: expected the folder of your images with data=folder, got none")
        return divide(folder.load(root, **preparation))
    if data in labelled.NAMES:
        return divide(labelled.load(data, root, **preparation))
    if preparation:
        raise ValueError(
            f"{next(iter(preparation))}: expected it with images of your own, got it with data={data}"
        )
    if data == "omniglot":
        return Split(*(omniglot.load(root, split=split) for split in ("train", "validation", "evaluation")))
    if data == "omniglot-45":
        held_out = omniglot.load(root, split="validation")
        training = omniglot.load(root, split="45").without_alphabets(sorted(set(held_out.alphabets)))
        return Split(training, held_out, omniglot.load(root, split="5"))
    if data != "glyphs":
        raise ValueError(f"data: expected one of {', '.join(DATA_SETS)}, got {data!r}")
    # Test glyphs come from another seed: other alphabets, other characters.
    everything, test = glyphs.load(classes=300, seed=0), glyphs.load(classes=100, seed=1)
    last = sorted(set(everything.alphabets))[-2:]
    return Split(everything.without_alphabets(last), everything.of_alphabets(last), test)


PREPARATION = ("mode", "size", "skip_unreadable")  # what files of models say of how their images were prepared


def split_of(facts: Mapping[str, Any], root: str | Path | None = None) -> Split:
    """Load the classes that a model was trained on, prepared as they were then.

    Args:
        facts: what its file says of it, see `models.facts_of`.
        root: as in `load_split`.

    Raises:
        ValueError: as `load_split`; or test classes that it was trained on, as the folder has changed since.
    """
    split = load_split(
        str(facts.get("data")), root, **{name: facts[name] for name in PREPARATION if facts.get(name)}
    )
    check_unseen(facts, split)
    return split


def check_unseen(facts: Mapping[str, Any], split: Split) -> None:
    """Refuse test classes among those that a model was trained on."""
    seen = set(facts.get("trained_on", ())).intersection(split.test.full_names)
    if seen:
        raise ValueError(
            f"data_dir: expected test classes that the model was not trained on, got {', '.join(sorted(seen)[:3])}"
            "; the folder has other classes than in training, and is divided in another way"
        )


Share = float | Collection[str]


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
        raise ValueError(
            f"data: expected 3 {by} names or more with a class of 2 images or more, for training, validation and "
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
