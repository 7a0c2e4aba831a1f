"""The edges of every experiment: arguments in, one-line errors and exit codes out, a folder that loses nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyro
import tyro

from vma_pyro.allocator import keep_freed_memory
from vma_pyro.jobs import kept
from vma_pyro.record import command

Config = TypeVar("Config")

# What a run in a folder is known by: its own files, or those of one of several models, or parts of its results.
RUNS = ("checkpoint.pt", "metrics.jsonl", "models/*/checkpoint.pt", "parts/*.json")


class Stopped(Exception):
    """A run was told to stop, and has left a checkpoint.

    Attributes:
        signal: that told it.
    """

    def __init__(self, signal: int, updates: int | None = None) -> None:
        at = "" if updates is None else f" at update {updates}"
        super().__init__(f"stopped{at}; go on with: {command()} --resume")
        self.signal = signal


def set_up() -> None:
    """Pyro as all experiments use it: parameters live in the modules, and nothing is checked over and over."""
    keep_freed_memory()  # chunks of an evaluation free as much as updates do
    pyro.settings.set(module_local_params=True)
    pyro.enable_validation(False)  # 0.4 to 1.3 ms per update; the tests run with it


def run(
    main: Callable[[Config], object],
    config: type[Config],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run with command-line arguments; bad input ends in one line, not in a traceback.

    Args:
        main: what to run.
        config: the dataclass of its options.
        description: for `--help`.
        arguments: instead of those of the process.
    """
    set_up()
    try:
        main(tyro.cli(config, description=description, args=arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stop:
        print(stop)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:  # outside training: nothing to save
        sys.exit(128 + signal.SIGINT)


def make_room(out: Path, *, resume: bool, load: Path | None) -> None:
    """Make the folder of results; an earlier run in it is moved aside, and nothing else is touched.

    Args:
        out: the folder.
        resume: go on with the run in it, if there is one.
        load: a checkpoint that is only evaluated; it may lie in the folder's neighbourhood, never inside.

    Raises:
        ValueError: a file, or a folder of other things.
        OSError: it cannot be made or written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    run_in_it = any(any(out.glob(found)) for found in RUNS)
    if resume and not run_in_it:
        print(f"no run to resume in {out}: a new one begins")
    if out.exists() and any(out.iterdir()) and not (resume and run_in_it):
        results_in_it = run_in_it or (out / "results.json").exists()
        if not results_in_it or (load is not None and load.resolve().is_relative_to(out.resolve())):
            raise ValueError(f"out: expected a new or empty folder, or one with an earlier run to move, got {out}")
        number = 1
        while (aside := out.with_name(f"{out.name}-{number}")).exists():
            number += 1
        out.rename(aside)
        print(f"moved the earlier run in {out} to {aside}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out: expected a folder that can be made, got {out} ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise PermissionError(f"out: expected a folder that can be written, got {out}")


def begin(job: kept.Job, *, load: Path | None, files: Sequence[Path] = ()) -> None:
    """Make room for a job whose parts are kept, or go on with it.

    Args:
        job: its options.
        load: what it tests, if it does not train that itself.
        files: what its parts depend on; going on is refused if they have changed.

    Raises:
        ValueError, OSError: as `make_room`; going on under another configuration.
    """
    make_room(job.out, resume=job.resume, load=load)
    kept.check_same(job, *files)
