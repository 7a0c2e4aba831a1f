"""Prepared npz files: the folder that they lie in, read with care, written whole or not at all."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vma_pyro._system.atomic import write_atomically


def data_root(root: str | Path | None) -> Path:
    """Find the folder of the data: `root`, else the environment variable VMA_DATA, else a cache in the home."""
    chosen = Path(root or os.environ.get("VMA_DATA") or Path("~", ".cache", "vma_pyro"))
    try:
        found = chosen.expanduser()
        (found / "omniglot").exists()  # refused where the folder may not be looked into
    except RuntimeError as error:
        raise ValueError(f"data_dir: expected a home folder for ~, found none, got {chosen}") from error
    except PermissionError as error:
        raise PermissionError(f"data_dir: expected a folder that can be read, got {found}") from error
    return found


def at_home(name: str, path: str | Path) -> Path:
    """Put the home folder in place of ~.

    Args:
        name: of the argument, for the error.
        path: that may begin with it.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a home folder for ~, found none, got {path}") from error


@contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """Remove the folders that were made for a download if it fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not made, or with something in it
                path.rmdir()
        raise


def read_npz(path: str | Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of a prepared file.

    Raises:
        ValueError: not an npz file, truncated, holding objects, or without one of the keys.
    """
    try:
        path = Path(path)
        # Opened here, as numpy leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys if key in file.files}
    except (BadZipFile, zlib.error, EOFError, OSError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: expected a prepared npz file, got one that cannot be read ({error})") from error
    if len(arrays) < len(keys):
        raise ValueError(f"{path}: expected arrays {list(keys)}, got {file.files}")
    return arrays


def write_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write a prepared file so that a reader sees the whole of it or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def keep_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write a prepared file if that is possible; else warn, as it will be prepared again the next time."""
    try:
        write_npz(path, **arrays)
    except OSError as error:
        warnings.warn(f"{path}: prepared data not kept ({error.strerror or error})", stacklevel=2)
