"""Files that are there as a whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that the path holds either what it held before or the whole new content.

    What a process that was killed while it wrote has left is cleared away by the next one that writes the file.

    Args:
        path: of the file; its folder must exist.
        write: puts the content into the open binary file it is given.

    Raises:
        OSError: the folder cannot be written or the disk is full; a previous file is untouched.
    """
    path = Path(path)
    _clear_leftovers(path)
    file, temporary = _temporary(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            # A temporary file may be read by its owner only; give it the permissions of any other new file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write text so that the path holds either what it held before or the whole of it."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _temporary(path: Path) -> tuple[BinaryIO, str]:
    """Open a file beside the path, locked while it is being written: one without a lock is left over."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        file = os.fdopen(handle, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return file, name
        if os.path.exists(name):  # else taken for left over, before it was locked
            return file, name
        file.close()


def _clear_leftovers(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        except OSError:  # it is being written, or somebody else's
            continue
