"""The data sets by their names: disjoint classes to train on, to select models with, and to test with once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vma_pyro.data import folder, glyphs, labelled, omniglot
from vma_pyro.data.division import Split, divide

DATA_SETS = ("glyphs", "omniglot", "omniglot-45", "omniglot-45-26", *labelled.NAMES, "folder")


def load_split(data: str, root: str | Path | None = None, **preparation: Any) -> Split:
    """Load the classes of a data set.

    Args:
        data: "glyphs" (procedural), "omniglot" (the canonical split: 30 background alphabets, of which 3 validate;
            20 test), "omniglot-45" (the split of figures 3 to 5 of the paper: 45 alphabets, of which the same 3
            validate; 5 test), "omniglot-45-26" (the same at 26 x 26, from the originals), one of torchvision's
            sets of labelled images (`labelled.NAMES`), or "folder" (your own images); the last two kinds are
            divided at random, by the seed 0.
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
    if data in ("omniglot-45", "omniglot-45-26"):
        side = 26 if data.endswith("-26") else 28
        held_out = omniglot.load(root, split="validation", side=side)
        training = omniglot.load(root, split="45", side=side).without_alphabets(sorted(set(held_out.alphabets)))
        return Split(training, held_out, omniglot.load(root, split="5", side=side))
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
