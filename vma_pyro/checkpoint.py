"""One checkpoint format: tensors and plain values only, written atomically, read with `weights_only`.

A checkpoint is a dictionary with `format` and `version` and whatever its writer adds. It never holds code, so
that reading a stranger's file is safe.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vma_pyro.atomic import write_atomically

FORMAT = "vma_pyro.checkpoint"
VERSION = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that the path holds either the previous one or the whole new one.

    Args:
        path: of the file; its folder must exist.
        content: tensors, numbers, strings, lists and dictionaries of these.

    Raises:
        OSError: the folder cannot be written or the disk is full; a previous checkpoint is untouched.
    """
    buffer = io.BytesIO()  # torch.save itself reports a full disk as a RuntimeError
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    try:
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"checkpoint: expected to be able to write {path}, got '{reason}'") from error


def load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint; tensors come to the CPU.

    Args:
        path: of the file.
        mmap: map the file instead of reading it: it opens at once, and its parts are read as they are needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this format and version, truncated, or a pickle with code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, found none at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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


def restore(module: nn.Module, state: dict[str, Any], *, name: str) -> None:
    """Load a state dictionary if it fits the module exactly; otherwise change nothing.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    own = module.state_dict()
    for key in own.keys() | state.keys():
        expected, got = (list(s[key].shape) if key in s else "none" for s in (own, state))
        if expected != got:
            raise ValueError(
                f"checkpoint: expected the architecture of {name}, whose tensor '{key}' has shape {expected}, "
                f"got {got}"
            )
    module.load_state_dict(state)
