"""One job at a time in a folder: a lock that its process holds, and that any end of the process gives up.

The lock lies beside the folder, as `.NAME.lock`: it stays where it is when the folder is moved aside, and a new
folder of the same name falls under it. A file that nobody has locked is left over and means nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vma_pyro._system.command import command

_held: dict[Path, BinaryIO] = {}  # by the job that goes on in this process
_open_locks: set[BinaryIO] = set()


def take(folder: Path, *, argument: str) -> None:
    """Hold a folder, and the folders within it, until `release` or the end of the process.

    Args:
        folder: need not exist; the same process may take it again.
        argument: whose value it is, for the error.

    Raises:
        BlockingIOError: another process holds it, a folder around it or one within it.
        OSError: nothing can be written there.
    """
    where = folder.resolve()
    if where in _held:
        return
    _held[where] = _locked(folder, argument)
    try:
        for other in where.rglob(".*.lock"):
            _check_free(other, argument, folder)
    except BlockingIOError:
        _give_up(_held.pop(where))
        raise


def release() -> None:
    """Give up all that this process has taken."""
    while _held:
        _give_up(_held.popitem()[1])


@contextmanager
def holding(folder: Path, *, argument: str) -> Iterator[None]:
    """Hold a folder for a while, unless the job that goes on in this process holds it anyway.

    Raises:
        BlockingIOError, OSError: as `take`.
    """
    file = None if folder.resolve() in _held else _locked(folder, argument)
    try:
        yield
    finally:
        if file is not None:
            _give_up(file)


def _locked(folder: Path, argument: str) -> BinaryIO:
    """Open and hold the lock of a folder, and write into it who holds it."""
    path = _lock_path(folder.resolve())
    file = _open(path, argument, folder)
    while not _lock(file, path, argument, folder):
        file.close()
        file = _open(path, argument, folder)
    _open_locks.add(file)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}: {command()}".encode())
    file.flush()
    try:
        for around in folder.resolve().parents:
            if around not in _held:
                _check_free(_lock_path(around), argument, folder)
    except BlockingIOError:
        _give_up(file)
        raise
    return file


def _lock_path(folder: Path) -> Path:
    """Put the lock beside the folder, or into one that nothing can lie beside: it cannot be moved either."""
    beside = folder.parent / f".{folder.name}.lock"
    writable = os.access(beside if beside.exists() else folder.parent, os.W_OK)
    return beside if writable or not folder.exists() else folder / ".lock"


def _open(path: Path, argument: str, folder: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"{argument}: expected a folder that can be made, got {folder} ({reason})") from error


def _lock(file: BinaryIO, path: Path, argument: str, folder: Path) -> bool:
    """Lock the open file, if it still is the one at the path: who held it removes it in the end."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise _refusal(path, argument, folder) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"warning: no locks on the file system of {folder}; see that no other job uses it")
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_free(path: Path, argument: str, folder: Path) -> None:
    """Refuse a lock that another process holds; one that is left over, or cannot be read, is none."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path, argument, folder) from error
    except OSError:
        return


def _refusal(path: Path, argument: str, folder: Path) -> BlockingIOError:
    holder = ""
    for _ in range(50):  # who has taken it this very moment has not yet written his name
        holder = " ".join(path.read_text().split()) if path.exists() else ""
        if holder:
            break
        time.sleep(0.02)
    return BlockingIOError(
        f"{argument}: expected a folder that no other job uses, got {folder}, in use by "
        f"{holder or 'another process'}; wait for its end, stop it, or choose another folder"
    )


def _give_up(file: BinaryIO) -> None:
    """Remove the lock while it is held, so that nobody else's is removed."""
    with suppress(OSError):
        os.unlink(file.name)
    _open_locks.discard(file)
    file.close()


def _forget() -> None:
    """Close all locks in a process that is forked off: the job's lock must not outlive the job in it."""
    for file in _open_locks:
        file.close()
    _open_locks.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
