"""What an experiment leaves behind: results.json for programs, report.md for people."""

from __future__ import annotations

import json
import math
import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

from common import plots
from vma_pyro._system.atomic import write_text
from vma_pyro._system.record import command


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; a bar within a cell is escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", str(cell)) for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def to_json(content: Mapping[str, Any]) -> str:
    """JSON with null for NaN and infinity, which JSON lacks: one image has no standard error."""
    return json.dumps(_finite(content), indent=1, default=str, allow_nan=False) + "\n"


def header(config: Any, *, seconds: float, device: torch.device, training: Mapping[str, Any]) -> dict[str, Any]:
    """What every results.json begins with.

    Args:
        config: the dataclass of all options.
        seconds: of the whole job, wall clock; of its last session if it was interrupted.
        device: on which it ran.
        training: facts about how each model was trained (updates, seconds, ...), or where it was loaded from.
    """
    return {
        "command": command(),
        "seconds": round(seconds, 1),
        "training": dict(training),
        "config": asdict(config),
        "versions": versions(device),
    }


def versions(device: torch.device) -> dict[str, str]:
    """What it was computed with."""
    from vma_pyro import __version__

    return {
        "vma_pyro": __version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


class Picture(NamedTuple):
    """A part of a report.

    Attributes:
        name: of its file.
        shows: in words.
        draw: makes it at a path.
    """

    name: str
    shows: str
    draw: Callable[[Path], object]


def write(folder: Path, content: Mapping[str, Any], title: str, parts: Sequence[str | Picture]) -> None:
    """results.json and report.md, then the pictures; the report is also printed.

    Args:
        folder: of the experiment.
        content: all figures, after those of `header`.
        title: of the report.
        parts: its paragraphs, tables and pictures.
    """
    trained = [f"{name}: {described(facts)}." for name, facts in content["training"].items()]
    head = [f"# {title}", f"`{content['command']}`", *map(_wrapped, trained)]

    def page(missing: Mapping[str, str]) -> str:
        shown = [part if isinstance(part, str) else _link(part, missing) for part in parts]
        return "\n\n".join([*head, *map(_wrapped, shown)])

    write_text(folder / "results.json", to_json(content))
    write_text(folder / "report.md", page({}) + "\n")
    pictures = [part for part in parts if isinstance(part, Picture)]
    found = {picture.name: plots.drawn(folder / picture.name, picture.draw) for picture in pictures}
    missing = {name: reason for name, reason in found.items() if reason}
    if missing:
        write_text(folder / "report.md", page(missing) + "\n")
    print(page(missing))


def _link(picture: Picture, missing: Mapping[str, str]) -> str:
    if picture.name in missing:
        return f"{picture.name} is not drawn ({missing[picture.name]})."
    return f"![{picture.shows}]({picture.name})"


def described(facts: Mapping[str, Any]) -> str:
    """How a model was trained, in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _wrapped(part: str) -> str:
    """A paragraph of lines that can be read; tables, headings and pictures as they are."""
    return part if part[0] in "|#!" else textwrap.fill(part, 110)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
