"""One checkpoint format: tensors and plain values only, written atomically, read with `weights_only`.

A checkpoint is a dictionary with `format` and `version` and whatever its writer adds. It never holds code, so
that reading a stranger's file is safe, and every part of it has a checksum, so that a damaged one is not taken for
whole.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from vma_pyro._system.atomic import write_atomically

FORMAT = "vma_pyro.checkpoint"
VERSION = 1
MARK = b"sha256 of all before: "  # in the comment at the end of the archive


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that the path holds either the previous one or the whole new one.

    Args:
        path: of the file; its folder must exist.
        content: tensors, numbers, strings, lists and dictionaries of these.

    Raises:
        OSError: the folder cannot be written or the disk is full; a previous checkpoint is untouched.
    """
    buffer = io.BytesIO()  # torch.save itself reports a full disk as a RuntimeError
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    _seal(buffer)
    try:
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"checkpoint: expected to be able to write {path}, got '{reason}'") from error


def load(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint; tensors come to the CPU.

    Args:
        path: of the file.
        mmap: map the file instead of keeping it in memory: its parts are read as they are needed. It is read
            through once all the same, to compare the checksums (about a second for each gigabyte).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this format and version, damaged, or a pickle with code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, found none at {path}")
    try:
        with path.open("rb") as file:  # opened once: another may be put in its place
            damage = _damage(file)
            if damage:
                raise ValueError(damage)
            file.seek(0)
            content = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise PermissionError(f"checkpoint: expected a file that can be read, got {path}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {path}: expected tensors and plain values, refused other content") from error
    except Exception as error:  # torch raises many kinds for truncated files
        raise ValueError(f"checkpoint {path}: expected a whole checkpoint, got a damaged file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path}: expected format '{FORMAT}', got another kind of file")
    if content.get("version") != VERSION:
        raise ValueError(f"checkpoint {path}: expected version {VERSION}, got {content.get('version')}")
    return content


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _seal(buffer: io.BytesIO) -> None:
    """Append a checksum of the whole archive as its comment, which readers of archives leave alone."""
    comment_length = 2 * hashlib.sha256().digest_size + len(MARK)
    buffer.seek(-2, os.SEEK_END)
    buffer.write(comment_length.to_bytes(2, "little"))
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.write(MARK + digest)


def _damage(file: BinaryIO) -> str:
    """Name what does not agree with its checksum; empty for a whole file."""
    seal_length = 2 * hashlib.sha256().digest_size + len(MARK)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - seal_length))
    seal = file.read()
    if seal.startswith(MARK):
        return "" if _digest(file, size - seal_length) == seal[len(MARK) :] else "wrong checksum"
    # One of before there were seals ends where the archive does, and has checksums of its parts.
    if not (seal[-22:].startswith(b"PK\5\6") and seal.endswith(b"\0\0")):
        return "no end"
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
    except Exception as error:  # as many kinds as there are ways to damage a file
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return "" if part is None else f"wrong checksum of {part}"


def _digest(file: BinaryIO, size: int) -> bytes:
    found = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest().encode()


def restore(module: nn.Module, state: dict[str, Any], *, name: str) -> None:
    """Load a state dictionary if it fits the module exactly; otherwise change nothing.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    own = module.state_dict()
    for key in own.keys() | state.keys():
        expected, got = (_shape(s[key]) if key in s else "none" for s in (own, state))
        if expected != got:
            raise ValueError(
                f"checkpoint: expected the architecture of {name}, whose tensor '{key}' has shape {expected}, "
                f"got {got}"
            )
    module.load_state_dict(state)
