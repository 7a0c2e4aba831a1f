"""What an experiment leaves behind: results.json for programs, report.md for people."""

from __future__ import annotations

import json
import math
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

from common import plots
from vma_pyro._system.atomic import write_text
from vma_pyro._system.command import command
from vma_pyro.evaluation import Mean


def to_json(content: Mapping[str, Any]) -> str:
    """JSON with null for NaN and infinity, which JSON lacks: one image has no standard error."""
    return json.dumps(_finite(content), indent=1, default=str, allow_nan=False) + "\n"


def header(config: Any, *, since: float, device: torch.device, training: Mapping[str, Any]) -> dict[str, Any]:
    """What every results.json begins with.

    Args:
        config: the dataclass of all options.
        since: when the job began, or its last session if it was interrupted, on the monotonic clock.
        device: on which it ran.
        training: facts about how each model was trained (updates, seconds, ...), or where it was loaded from.
    """
    return {
        "command": command(),
        "seconds": round(time.monotonic() - since, 1),
        "training": dict(training),
        "config": asdict(config),
        "versions": versions(device),
    }


def versions(device: torch.device) -> dict[str, str]:
    """The versions and the device behind the figures."""
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


Parts = Sequence[str | Picture]  # paragraphs, headings, tables and pictures


def write(folder: Path, content: Mapping[str, Any], title: str, parts: Parts) -> None:
    """Write results.json and report.md, then the pictures; the report is also printed.

    Args:
        folder: of the experiment.
        content: all figures, after those of `header`.
        title: of the report.
        parts: what it consists of, after how the models were trained.
    """
    trained = [f"{name}: {_described(facts)}." for name, facts in content["training"].items()]
    write_as((folder / "results.json", folder / "report.md"), content, title, [*trained, *parts])


def write_as(files: tuple[Path, Path], content: Mapping[str, Any], title: str, parts: Parts) -> None:
    """Write figures and a page to files of any names; the pictures go beside them.

    Args:
        files: of the figures and of the page.
        content: all figures, and the `command` that repeats them.
        title: of the page.
        parts: what it consists of.
    """
    figures, report = files

    def page(missing: Mapping[str, str]) -> str:
        shown = [part if isinstance(part, str) else _link(part, missing) for part in parts]
        return "\n\n".join([f"# {title}", f"`{content['command']}`", *map(_wrapped, shown)])

    write_text(figures, to_json(content))
    write_text(report, page({}) + "\n")
    pictures = [part for part in parts if isinstance(part, Picture)]
    found = {picture.name: plots.drawn(report.with_name(picture.name), picture.draw) for picture in pictures}
    missing = {name: reason for name, reason in found.items() if reason}
    if missing:
        write_text(report, page(missing) + "\n")
    print(page(missing))


def _link(picture: Picture, missing: Mapping[str, str]) -> str:
    if picture.name in missing:
        return f"{picture.name} is not drawn ({missing[picture.name]})."
    return f"![{picture.shows}]({picture.name})"


def _described(facts: Mapping[str, Any]) -> str:
    """How a model was trained, in one line; of trainings before the last, their number and all their updates."""
    told = {name: value for name, value in facts.items() if value is not None and name != "cycles"}
    if before := facts.get("cycles"):
        updates = sum(cycle.get("updates", 0) for cycle in before)
        told["before_that"] = f"{len(before)} trainings of {updates} updates in all (see the figures' file)"
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in told.items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _wrapped(part: str) -> str:
    """A paragraph in lines of a readable length; tables, headings and pictures as they are."""
    return part if part[0] in "|#!" else textwrap.fill(part, 110)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(share: Mean) -> str:
    """A share in per cent, with its standard error."""
    return f"{100 * share.mean:.1f} ± {100 * share.se:.1f}"


def compared(nll: Mean, more: Mean) -> str:
    """An NLL, and in brackets how much more it is than another one."""
    return f"{nll} ({more.mean:+.2f} ± {more.se:.2f})"


def plural(number: int, noun: str) -> str:
    """The number with its noun: "1 shot", "2 shots", "2 classes"."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"
