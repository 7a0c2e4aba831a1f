"""Disjoint classes to train on, to select models with, and to test with once."""

from __future__ import annotations

import math
from collections.abc import Collection
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
        by: what is never cut through: groups, or classes alone.
        seed: of the random choice.

    Raises:
        ValueError: too few groups, unknown names, or names in two parts.
    """
    check_whole("seed", seed, least=0)
    if by not in ("group", "class"):
        raise ValueError(f"by: expected 'group' or 'class', got {by!r}")
    of = data.groups if by == "group" else data.names
    # Units that offer a query come first: every part needs one.
    several = {unit for unit, count in zip(of, data.counts, strict=True) if count > 1}
    units = sorted(set(of))
    if len(several) < 3:
        raise ValueError(
            f"data: expected 3 {by}s or more with a class of 2 images or more, for training, validation and test, "
            f"got {len(several)}"
        )
    order = [units[i] for i in np.random.default_rng(seed).permutation(len(units))]
    tested = _chosen("test", test, order, several, spare=2)
    rest = [unit for unit in order if unit not in tested]
    held_out = _chosen("validation", validation, rest, several, spare=1)
    trained = [unit for unit in rest if unit not in held_out]
    parts = {"train": trained, "validation": held_out, "test": tested}
    for name, part in parts.items():
        if not several.intersection(part):
            raise ValueError(f"{name}: expected a {by} with a class of 2 images or more, got {len(part)} without")
    rows = {name: [i for i, unit in enumerate(of) if unit in set(part)] for name, part in parts.items()}
    return Split(*(data.of_classes(rows[name]) for name in ("train", "validation", "test")))


def _chosen(name: str, share: Share, order: list[str], several: set[str], *, spare: int) -> list[str]:
    """The units of a part: those named, or a share of those in order, which has a query and leaves some."""
    if isinstance(share, int | float):
        if not 0 < share < 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, or names, got {share}")
        number = min(max(1, math.floor(share * len(order) + 0.5)), len(order) - spare)
        # The first unit with a query, then the others in order, as long as enough of them are left.
        first = next(unit for unit in order if unit in several)
        left = len(several.intersection(order)) - 1
        chosen = [first]
        for unit in order:
            if len(chosen) == number:
                break
            if unit != first and (unit not in several or left > spare):
                chosen.append(unit)
                left -= unit in several
        return chosen
    unknown = set(share) - set(order)
    if unknown or not share:
        raise ValueError(f"{name}: expected some of {', '.join(order)}, got {sorted(share)}")
    return [unit for unit in order if unit in share]
