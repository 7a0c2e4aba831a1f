"""Models that come with the package, each with a card that says how it was made and how good it is.

`omniglot` has the paper's likelihood, independent pixels; `omniglot-causal` goes on from it with pixels that see
their neighbours, and draws sharp strokes. Figures of the two are not to be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WORD = Path("pretrained")  # stands for the Omniglot model with the paper's likelihood
CAUSAL = Path("pretrained-causal")  # stands for the one whose pixels see their neighbours
NAMES = {WORD: "omniglot", CAUSAL: "omniglot-causal"}


def card(name: str = "omniglot") -> dict[str, Any]:
    """How a model was made: data, split, updates, budget, command, and its figures.

    Raises:
        ValueError: no model of that name.
    """
    content: dict[str, Any] = json.loads(path_of(name).with_suffix(".json").read_text())
    return content


def file_of(path: str | Path) -> Path:
    """The file itself, or for the words "pretrained" and "pretrained-causal" those that come with the package."""
    return path_of(NAMES[Path(path)]) if Path(path) in NAMES else Path(path)


def path_of(name: str) -> Path:
    """The file of a model.

    Raises:
        ValueError: no model of that name.
    """
    path = FOLDER / f"{name}.pt"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.pt")))
        raise ValueError(f"name: expected one of {known}, got {name!r}")
    return path
