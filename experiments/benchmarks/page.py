"""Where a benchmark's figures go: JSON for programs, Markdown and a picture for people."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vma_pyro import cli
from vma_pyro._system.atomic import write_text
from vma_pyro._system.record import command
from vma_pyro.training import keep_freed_memory


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), **versions}


def device_of(accelerator: str) -> torch.device:
    """Where to run.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator: expected a GPU for cuda, found none")
    return torch.device(accelerator)


def write(folder: Path, name: str, title: str, content: Mapping[str, Any], lines: Sequence[str]) -> None:
    """`name`.json with the figures, and `name`.md; both say how to repeat them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps({"command": command(), **content}, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    page = "\n".join([f"# {title}", "", f"`{command()}`", "", f"Machine: {about}.", "", *lines]).rstrip() + "\n"
    write_text(folder / f"{name}.md", page)
    print(page)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def set_up() -> None:
    """As the experiments do it."""
    keep_freed_memory()
    cli.set_up()


def run(main: Any, config: Any, description: str | None) -> None:
    """Run with command-line arguments; bad input ends in one line, not in a traceback."""
    set_up()
    cli.run(main, config, description)
