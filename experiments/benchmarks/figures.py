"""Where a benchmark's figures go: JSON for programs, Markdown and a picture for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe

from common import results
from vma_pyro._system.command import command


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of every benchmark."""

    output: Path = Path("runs/benchmarks")
    """Folder for the figures, the page and its picture, which bear the benchmark's name."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""


def write(
    folder: Path,
    name: str,
    title: str,
    content: Mapping[str, Any],
    parts: Sequence[str | results.Picture],
    *,
    device: torch.device,
) -> None:
    """Write NAME.json and NAME.md, which say how to repeat them, and the pictures.

    Args:
        folder: of all benchmarks.
        name: of this one.
        title: of the page.
        content: all figures.
        parts: paragraphs, tables and pictures of the page.
        device: where it ran.
    """
    machine = describe(device)
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    folder.mkdir(parents=True, exist_ok=True)
    results.write_as(
        (folder / f"{name}.json", folder / f"{name}.md"),
        {"command": command(), "machine": machine, **content},
        title,
        [f"Machine: {about}.", *parts],
    )
