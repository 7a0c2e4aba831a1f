"""Images of your own: a folder of pictures, or an npz file of arrays.

================================ =========================================================================
`path/class/picture.png`         classes
`path/group/class/picture.png`   classes in groups (alphabets, authors, ...), which splits never cut through
`path/picture.png`               pictures without classes: each is one of its own, an entry of a memory
`path.npz`                       `images` [N, height, width] or [N, height, width, 3], `labels` [N], and perhaps
                                 `groups` [N]
================================ =========================================================================
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vma_pyro.data.pictures import (
    MODES,
    SUFFIXES,
    Canvas,
    Mode,
    Unreadable,
    check_size,
    coloured,
    read_picture,
)
from vma_pyro.data.prepared import at_home, keep_npz, read_npz
from vma_pyro.data.records import ImageClasses

KEYS = ("pixels", "counts", "names", "groups", "fingerprint")
VERSION = 2  # of how pictures are prepared


class Listed(NamedTuple):
    """A picture file, and which class and group it is of."""

    path: Path
    name: str
    group: str


def load(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    mode: Mode = "binary",
    skip_unreadable: bool = False,
    cache: str | Path | None = None,
) -> ImageClasses:
    """Load images of your own.

    Pictures are turned by their exif orientation, put on white where they are transparent, scaled until they just
    cover the size and cropped in the middle. "binary": ink is what is darker than half of the way from black to
    white, or what is lighter, whichever covers less of all pictures. "grey" and "colour" have 8 bits.

    They are prepared once, and read from the cache as long as no file has changed.

    Args:
        path: of the folder or npz file, see above. Hidden files, and those that are no pictures by their names,
            are passed over; pictures of kinds that cannot be read (heic, svg, ...) with a warning.
        size: side in pixels, or (height, width); None if all images have the same size.
        mode: "binary" (1 bit), "grey" or "colour" (8 bits).
        skip_unreadable: go on without files that cannot be read, and name them in a warning.
        cache: folder for what has been prepared; None for one in the home folder.

    Returns:
        The classes, sorted by group and name. A class with a single image warns: it can be in a memory, but
        none of its images can be looked for there.

    Raises:
        FileNotFoundError: no such folder or file, or no pictures in it.
        ValueError: a file that cannot be read, images of different sizes without `size`, another arrangement.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"data_dir: expected a path, got {type(path).__name__}")
    path, cache = at_home("data_dir", path), None if cache is None else at_home("cache", cache)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    wanted = check_size(size)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise ValueError(f"data_dir: expected a folder of images or an npz file, got the file {path}")
        found = _of_arrays(path, wanted, mode)
    elif path.is_dir():
        found = _of_pictures(path, wanted, mode, skip_unreadable, cache)
    else:
        raise FileNotFoundError(f"data_dir: expected a folder of images or an npz file, found none at {path}")
    single = [name for name, count in zip(found.names, found.counts, strict=True) if count == 1]
    if single:
        which = ", ".join(single[:3]) + (", ..." if len(single) > 3 else "")
        warnings.warn(
            f"{path}: {len(single)} of {len(found)} classes have a single image ({which}): it can be in a memory, "
            "but no image of its class can be looked for there",
            stacklevel=2,
        )
    return found


def _of_pictures(
    path: Path, size: tuple[int, int] | None, mode: Mode, skip: bool, cache: str | Path | None
) -> ImageClasses:
    listed = list_pictures(path)
    fingerprint = _fingerprint(path, listed, size, mode)
    home = Path(cache) if cache is not None else Path("~", ".cache", "vma_pyro", "folders").expanduser()
    name = hashlib.sha256(f"{path.resolve()} {size} {mode}".encode()).hexdigest()[:24]
    kept = home / f"{name}.npz"
    if kept.exists():
        try:
            arrays = read_npz(kept, KEYS)
            if str(arrays["fingerprint"]) == fingerprint:
                return _record(arrays["pixels"], arrays["counts"], arrays["names"], arrays["groups"], mode)
        except ValueError:  # damaged: prepared again
            pass
    canvas, read, unreadable = Canvas(size, mode), [], []
    for picture in listed:
        try:
            canvas.add(read_picture(picture.path, mode))
            read.append(picture)
        except Unreadable as error:
            if not skip:
                raise ValueError(
                    f"{error}; --skip-unreadable (skip_unreadable=True) goes on without it"
                ) from error
            unreadable.append(picture.path)
    if not read:
        raise ValueError(f"data_dir: expected pictures that can be read in {path}, got {len(unreadable)} others")
    if unreadable:
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        warnings.warn(f"{unreadable[0]}{more}: left out, as not to be read", stacklevel=3)
    pixels = canvas.pixels([picture.path for picture in read])
    names, groups = [picture.name for picture in read], [picture.group for picture in read]
    counts, names, groups = _count(names, groups)
    if not unreadable:
        arrays = {"counts": counts, "names": np.array(names), "groups": np.array(groups)}
        keep_npz(kept, pixels=pixels, fingerprint=np.array(fingerprint), **arrays)
    return _record(pixels, counts, names, groups, mode)


def list_pictures(path: Path) -> list[Listed]:
    """List the pictures of a folder by class and group, sorted.

    Raises:
        FileNotFoundError: no pictures.
        ValueError: pictures at different depths, or too deep.
    """
    found, others = [], []
    for folder, folders, files in os.walk(path, followlinks=True, onerror=_unread):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = Path(folder).relative_to(path).parts
        visible = sorted(name for name in files if not name.startswith("."))
        own = [name for name in visible if name.lower().endswith(SUFFIXES)]
        others += [Path(folder, name) for name in visible if name not in own and _is_image(name)]
        if own and len(parts) > 2:
            raise ValueError(
                f"data_dir: expected {path}/class/picture or {path}/group/class/picture, got "
                f"{Path(folder, own[0])}"
            )
        if len(parts) > 2:
            folders.clear()
        for name in own:
            whole = Path(folder, name)
            if not parts:
                found.append(Listed(whole, readable(name), readable(name)))
            else:
                found.append(Listed(whole, readable(parts[-1]), readable(parts[0])))
    if not found:
        kinds, got = ", ".join(s[1:] for s in SUFFIXES), f"{others[0]}" if others else "none"
        raise FileNotFoundError(f"data_dir: expected pictures ({kinds}) in folders of {path}, found {got}")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"{others[0]}{more}: passed over, as not of a kind that is read", stacklevel=4)
    depths = {len(picture.path.relative_to(path).parts): picture.path for picture in found}
    if len(depths) > 1:
        some = [str(picture) for picture in list(depths.values())[:2]]
        raise ValueError(f"data_dir: expected all pictures at the same depth, got {some[0]} and {some[1]}")
    return sorted(found, key=lambda picture: (picture.group, picture.name, picture.path))


def readable(name: str) -> str:
    """Write the name of a file so that it can be shown anywhere: bytes that are no text are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_image(name: str) -> bool:
    """Whether a file is an image by its name, of whatever kind."""
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def _unread(error: OSError) -> None:
    raise PermissionError(f"data_dir: expected folders that can be read, got {error.filename} ({error.strerror})")


def _of_arrays(path: Path, size: tuple[int, int] | None, mode: Mode) -> ImageClasses:
    arrays = read_npz(path, ("images", "labels"))
    images, labels = arrays["images"], _names(path, "labels", arrays["labels"])
    if labels.ndim != 1 or images.ndim not in (3, 4) or len(labels) != len(images) or not len(images):
        raise ValueError(
            f"{path}: expected images [N, height, width], [N, height, width, 3] or [N, 3, height, width], one or "
            "more, and labels [N], got "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    with np.load(path, allow_pickle=False) as file:
        grouped = "groups" in file.files
    groups = _names(path, "groups", read_npz(path, ("groups",))["groups"]) if grouped else labels
    if groups.shape != labels.shape:
        raise ValueError(f"{path}: expected groups [{len(labels)}], one per image, got {list(groups.shape)}")
    order = sorted(range(len(labels)), key=lambda i: (groups[i].item(), labels[i].item()))
    canvas = Canvas(size, mode)
    for image in _as_bytes(path, images)[order]:
        canvas.add(coloured(image, mode))
    counts, names, of = _count([str(labels[i]) for i in order], [str(groups[i]) for i in order])
    return _record(canvas.pixels(range(len(order))), counts, names, of, mode)


def _names(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Labels or groups of any type that names things."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "backslashreplace")
    what = "" if values.dtype.kind in "biufU" else str(values.dtype)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and np.abs(values).max(initial=0) < 2**53):
        what = "NaN, infinity or one too large"
    elif values.dtype.kind == "f" and (values != np.round(values)).any():
        what = "fractions"
    if values.dtype.kind == "U" and (np.char.str_len(values) == 0).any():
        what = "an empty name"
    if what:
        raise ValueError(f"{path}: expected {name} that are whole numbers or names, got {what}")
    return values.astype(np.int64) if values.dtype.kind == "f" else values


def _as_bytes(path: Path, images: np.ndarray) -> np.ndarray:
    """Images [N, height, width, C], uint8 0..255, of bytes, of truth values, or of numbers from 0 to 1."""
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{path}: expected images of 1 or 3 colours, got shape {list(images.shape)}")
    if images.dtype == np.uint8 and images.max(initial=0) > 1:
        return images
    if images.dtype == np.uint8 or images.dtype == bool:
        return images.astype(np.uint8) * 255
    low, high = (images.min(), images.max()) if images.dtype.kind == "f" else (-1, -1)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{path}: expected images of type uint8 or bool, or real numbers from 0 to 1, got {images.dtype}"
            + (f" from {low:g} to {high:g}" if images.dtype.kind == "f" else "; .astype('uint8') makes bytes")
        )
    return (images * 255).round().astype(np.uint8)


def _count(names: Sequence[str], groups: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """Classes of images that stand class by class: the number of images, the name and the group of each."""
    keys = list(zip(groups, names, strict=True))
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    counts = np.diff([*starts, len(keys)])
    return counts, [names[i] for i in starts], [groups[i] for i in starts]


def _record(
    pixels: np.ndarray, counts: np.ndarray, names: Iterable[str], groups: Iterable[str], mode: Mode
) -> ImageClasses:
    bits = 1 if mode == "binary" else 8
    return ImageClasses(pixels, np.asarray(counts), tuple(map(str, names)), tuple(map(str, groups)), bits)


def _fingerprint(path: Path, listed: Sequence[Listed], size: tuple[int, int] | None, mode: Mode) -> str:
    """What changes with any of the files: names, sizes, times (also of a new name), and places on the disk."""
    facts: list[Any] = [VERSION, size, mode]
    for picture in listed:
        try:
            about = picture.path.stat()
            state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        except OSError:  # a link to nothing, which is not to be read either
            state = (-1, -1, -1, -1)
        facts.append((str(picture.path.relative_to(path)), *state))
    return hashlib.sha256(json.dumps(facts).encode(sys.getfilesystemencoding(), "surrogateescape")).hexdigest()
