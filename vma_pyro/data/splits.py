"""Disjoint classes to train on, to select models with, and to test with once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vma_pyro.data import glyphs, omniglot
from vma_pyro.data.records import Characters

DATA_SETS = ("glyphs", "omniglot", "omniglot-45")


class Split(NamedTuple):
    """Holds disjoint classes: no alphabet is in two of them."""

    train: Characters
    validation: Characters
    test: Characters


def load_split(data: str, root: str | Path | None = None) -> Split:
    """Load the classes of a data set.

    Args:
        data: "glyphs" (procedural), "omniglot" (the canonical split: 30 background alphabets, of which 3 validate;
            20 test) or "omniglot-45" (the split of figures 3 to 5 of the paper: 45 alphabets, of which the same 3
            validate; 5 test).
        root: folder of the data, as for `omniglot.load`; glyphs need none.

    Raises:
        ValueError: another name, or a file that is damaged.
        FileNotFoundError: no data, and downloading failed.
    """
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
