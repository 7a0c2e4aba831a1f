"""Typed records of binary images, and prepared npz files that are read with care and written atomically."""

from __future__ import annotations

import copy
import os
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vma_pyro._system.atomic import write_atomically
from vma_pyro.memory.checks import MOST_INK


@dataclass(frozen=True, eq=False)
class Characters:
    """Examples of many classes, as in Omniglot.

    Args:
        images: uint8 {0, 1}, 1 = ink, [classes, examples, 28, 28].
        names: name of each class.
        alphabets: alphabet of each class; splits never cut through one.

    Raises:
        ValueError: other dtype, shape or values, or another number of names than classes.
    """

    images: np.ndarray
    names: tuple[str, ...]
    alphabets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check once, so that no consumer has to."""
        self._check_images()
        for name, values in (("names", self.names), ("alphabets", self.alphabets)):
            if len(values) != len(self.images):
                raise ValueError(f"{name}: expected {len(self.images)}, one per class, got {len(values)}")
        look_at_ink("images", self.images)

    def _check_images(self) -> None:
        check_binary("images", self.images, ndim=4)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.images)

    def of_alphabets(self, alphabets: Collection[str]) -> Characters:
        """The classes of these alphabets, in order."""
        unknown = set(alphabets) - set(self.alphabets)
        if unknown:
            raise ValueError(f"alphabets: expected some of {sorted(set(self.alphabets))}, got {sorted(unknown)}")
        return self._keep([a in alphabets for a in self.alphabets])

    def without_alphabets(self, alphabets: Collection[str]) -> Characters:
        """The classes of all other alphabets, in order."""
        return self._keep([a not in alphabets for a in self.alphabets])

    def _keep(self, keep: Sequence[bool]) -> Characters:
        rows = np.flatnonzero(keep)
        names = tuple(self.names[i] for i in rows)
        kept = copy.copy(self)  # what has been named once is not named again for every part
        parts = {"images": self.images[rows], "names": names, "alphabets": tuple(self.alphabets[i] for i in rows)}
        kept.__dict__.update(parts)
        kept._check_images()
        return kept


@dataclass(frozen=True, eq=False)
class GreyCharacters(Characters):
    """The same in shades of grey: images float32 from 0 to 1 (ink), for a model with a likelihood for them.

    Raises:
        ValueError: other dtype, shape or values, or another number of names than classes.
    """

    def _check_images(self) -> None:
        check_grey("images", self.images, ndim=4)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Single images with labels, as in MNIST.

    Args:
        images: uint8 {0, 1}, 1 = ink, [N, 28, 28].
        labels: uint8 [N].

    Raises:
        ValueError: other dtype, shape or values, or another number of labels than images.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Check once, so that no consumer has to."""
        check_binary("images", self.images, ndim=3)
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels: expected shape [{len(self.images)}], got {list(self.labels.shape)}")
        look_at_ink("images", self.images)

    def shuffled(self, seed: int) -> LabelledImages:
        """The same images in random order; files may be sorted by label, and a part of them would be of few."""
        order = np.random.default_rng(seed).permutation(len(self))
        shuffled = copy.copy(self)
        shuffled.__dict__.update(images=self.images[order], labels=self.labels[order])
        return shuffled

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


def check_binary(name: str, images: np.ndarray, *, ndim: int) -> None:
    """Refuse anything but uint8 {0, 1} with `ndim` dimensions, the last two 28 x 28."""
    _check_shape(name, images, ndim)
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: expected dtype uint8, got {images.dtype}")
    if images.max() > 1:
        raise ValueError(f"{name}: expected binary values 0 and 1, got values up to {images.max()}")


def check_grey(name: str, images: np.ndarray, *, ndim: int) -> None:
    """Refuse anything but values from 0 to 1 with `ndim` dimensions, the last two 28 x 28."""
    _check_shape(name, images, ndim)
    if images.dtype != np.float32:
        raise ValueError(f"{name}: expected dtype float32, got {images.dtype}")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # NaN is refused as well
        raise ValueError(f"{name}: expected values from 0 to 1, got {low:g} to {high:g}")


def look_at_ink(name: str, images: np.ndarray) -> None:
    """Warn of what is hardly ever meant: ink and paper inverted, images without any ink.

    Args:
        name: for the warnings.
        images: from 0 (paper) to 1 (ink) [..., 28, 28].
    """
    share = images.mean(axis=(-2, -1), dtype=np.float32)
    dark, empty = int((share > MOST_INK).sum()), int((share == 0).sum())
    if share.mean() > MOST_INK:
        warnings.warn(
            f"{name}: expected less ink (1) than paper (0), got {share.mean():.0%} ink; give 1 - {name} if the "
            "drawings are dark on light",
            stacklevel=4,
        )
    elif images.dtype == np.uint8 and dark > 0:  # a photograph may well be dark
        warnings.warn(
            f"{name}: expected less ink (1) than paper (0), got more than {MOST_INK:.0%} ink in {dark} of "
            f"{share.size} images; give 1 - image for those that are inverted",
            stacklevel=4,
        )
    if empty:
        warnings.warn(
            f"{name}: expected ink in every image, got {empty} of {share.size} images without; leave these out",
            stacklevel=4,
        )


def _check_shape(name: str, images: np.ndarray, ndim: int) -> None:
    if images.ndim != ndim or images.shape[-2:] != (28, 28):
        lead = "classes, examples" if ndim == 4 else "N"
        raise ValueError(f"{name}: expected shape [{lead}, 28, 28], got {list(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"{name}: expected at least one image, got shape {list(images.shape)}")


def data_root(root: str | Path | None) -> Path:
    """The folder of the data: `root`, else the environment variable VMA_DATA, else a cache in the home folder."""
    chosen = Path(root or os.environ.get("VMA_DATA") or Path("~", ".cache", "vma_pyro"))
    try:
        found = chosen.expanduser()
        (found / "omniglot").exists()  # refused where the folder may not be looked into
    except RuntimeError as error:
        raise ValueError(f"data_dir: expected a home folder for ~, found none, got {chosen}") from error
    except PermissionError as error:
        raise PermissionError(f"data_dir: expected a folder that can be read, got {found}") from error
    return found


@contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """Folders that are made for a download go again if it fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not made, or with something in it
                path.rmdir()
        raise


def read_npz(path: str | Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of a prepared file.

    Raises:
        ValueError: not an npz file, truncated, holding objects, or without one of the keys.
    """
    try:
        path = Path(path)
        # Opened here, as numpy leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise ValueError(f"{path}: expected arrays {list(keys)}, got {file.files}")
            return {key: file[key] for key in keys}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        TypeError,
        ValueError,
        NotImplementedError,
    ) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: expected a prepared npz file, got one that cannot be read ({error})") from error


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
