"""Parts of a long job, kept in files, so that an interrupted job goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from tqdm import tqdm

from vma_pyro._system.atomic import write_text

Item = TypeVar("Item", bound=tuple[Any, ...])


class LongJob(Protocol):
    """The options of a long job, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def out(self) -> Path:
        """Folder of the job."""

    @property
    def resume(self) -> bool:
        """Go on with the job in the folder."""


# May differ between the sessions of one job: where things are, and when and on what each of its parts is computed.
FREE = {
    "out",
    "resume",
    "data_dir",
    "session_minutes",
    "checkpoint_seconds",
    "accelerator",
    "capture",
    "new_budget",
}


def once(config: LongJob, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of the results: from its file, if an interrupted job has got so far, else computed and kept."""
    path = config.out / "parts" / f"{name}.json"
    if config.resume and path.exists():
        return _read(path)
    content = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"content": content, "sha256": _digest(content)}, indent=1) + "\n")
    return content


def each(
    config: LongJob, items: Sequence[Item], compute: Callable[[Item], dict[str, Any]], *, unit: str
) -> list[dict[str, Any]]:
    """A part of the results for each item, named by its fields; see `once`."""
    found = []
    for item in tqdm(items, unit=unit):
        name = "-".join(map(str, item)).replace(" ", "_").replace(",", "")
        found.append(once(config, name, partial(compute, item)))
    return found


def _read(path: Path) -> dict[str, Any]:
    """A part as it was kept.

    Raises:
        ValueError: damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not {"sha256", "content"} & found.keys():  # kept before there were checksums
            return found
        content: dict[str, Any] = found["content"]
        whole = found["sha256"] == _digest(content)
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"resume: expected a whole part, got the damaged file {path}; remove it, and go on")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_same(config: LongJob, *files: Path) -> None:
    """Refuse to go on under another configuration: parts of both would stand on one page.

    Args:
        config: of the job.
        files: that the parts depend on; what is in them must not have changed either.

    Raises:
        ValueError: an option or a file that differs.
    """
    path = config.out / "config.json"
    present = json.loads(json.dumps(asdict(config), default=str))
    for n, file in enumerate(files, 1):  # by number, as the package's own may lie elsewhere when the run goes on
        name = file.name if n == 1 else f"file {n}, {file.name}"
        present[f"content of {name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    if path.exists():
        old, new = _flat(json.loads(path.read_text())), _flat(present)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"resume: expected {name} = {old.get(name)!r} as in {path}, got {new.get(name)!r}"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(present, indent=1) + "\n")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options within options under names with dots, without those that are free."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif name not in FREE:
            found[prefix + name] = value
    return found
