"""Models that come with the package, each with a card that says how it was made and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WORD = Path("pretrained")  # stands for the Omniglot model that comes with the package


def card(name: str = "omniglot") -> dict[str, Any]:
    """How a model was made: data, split, updates, budget, command, and its figures.

    Raises:
        ValueError: no model of that name.
    """
    content: dict[str, Any] = json.loads(path_of(name).with_suffix(".json").read_text())
    return content


def file_of(path: str | Path) -> Path:
    """The file itself, or for the word "pretrained" that of the model that comes with the package."""
    return path_of("omniglot") if Path(path) == WORD else Path(path)


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
