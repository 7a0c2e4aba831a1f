"""The folder of an experiment: nothing in it is ever lost, and only one job at a time works in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from common import kept
from vma_pyro._system import lock

# A run in a folder is recognised by its own files, or those of one of several models, or parts of its results.
RUNS = ("checkpoint.pt", "metrics.jsonl", "models/*/checkpoint.pt", "parts/*.json")


def make_room(out: Path, *, resume: bool, load: Path | None) -> None:
    """Make the folder of results; an earlier run in it is moved aside, and nothing else is touched.

    From here on the folder is this process's own, until its end.

    Args:
        out: the folder.
        resume: go on with the run in it, if there is one.
        load: a checkpoint that is only evaluated; it may lie in the folder's neighbourhood, never inside.

    Raises:
        ValueError: a file, or a folder of other things.
        BlockingIOError: another job goes on in the folder.
        OSError: it cannot be made or written.
    """
    where = out.resolve()
    if Path.cwd().is_relative_to(where):
        raise ValueError(f"out: expected a folder for this run alone, got {out}, which the present one is in")
    lock.take(out, argument="out")  # before anything is looked at, as it may be moved
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


def begin(job: kept.LongJob, *, load: Path | None, files: Sequence[Path] = ()) -> None:
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
