"""Omniglot at 28x28 or 26x26, binary (Lake, Salakhutdinov & Tenenbaum 2015).

Prepared arrays are looked for first (`omniglot/background.npz` and `omniglot/evaluation.npz` below the root, each
with `images` uint8 [classes, 20, 28, 28], `alphabet` and `character` [classes]); else they are made from the
original drawings in torchvision's folder `omniglot-py`, which is downloaded when absent, and kept. Those of 26x26
are in `omniglot-26`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vma_pyro.data.image_checks import check_28x28
from vma_pyro.data.prepared import data_root, keep_npz, made_for, read_npz
from vma_pyro.data.records import Characters

SPLITS = ("background", "evaluation", "train", "validation", "45", "5")

# Held out of the 30 background alphabets for model selection: 63 characters, small and large alphabets of
# three writing traditions.
VALIDATION_ALPHABETS = ("Early_Aramaic", "Greek", "Tagalog")

# The test alphabets of figures 3 to 5 of Bornschein et al. 2017: 144 characters.
TEST_5 = ("Tengwar", "Sylheti", "Tibetan", "Syriac_(Serto)", "ULOG")


def load(root: str | Path | None = None, *, split: str, side: int = 28, download: bool = True) -> Characters:
    """Load Omniglot's characters.

    Args:
        root: folder of the data; None takes the environment variable VMA_DATA, else a cache in the home folder.
        split: "background" (30 alphabets, 964 characters) or "evaluation" (20, 659), the canonical split;
            "train" and "validation", the background without and with only `VALIDATION_ALPHABETS`; "45" and "5",
            all alphabets without and with only `TEST_5`.
        side: 28, see `to_28x28`, or 26, see `to_26x26`: figures of the two are not to be compared.
        download: fetch the originals when neither they nor prepared files are there.

    Returns:
        Images uint8 {0, 1} [classes, 20, side, side] with names and alphabets.

    Raises:
        ValueError: unknown split or side, or a prepared file that is damaged.
        FileNotFoundError: no data, and downloading is not wanted or failed.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if not isinstance(side, int) or side not in SIDES:
        raise ValueError(f"side: expected one of {', '.join(map(str, SIDES))}, got {side!r}")
    root = data_root(root)
    if split in ("background", "evaluation"):
        return _half(root, split, side, download)
    if split in ("train", "validation"):
        background = _half(root, "background", side, download)
        cut = background.of_alphabets if split == "validation" else background.without_alphabets
        return cut(VALIDATION_ALPHABETS)
    halves = [_half(root, half, side, download) for half in ("background", "evaluation")]
    everything = Characters(
        np.concatenate([half.images for half in halves]),
        halves[0].names + halves[1].names,
        halves[0].alphabets + halves[1].alphabets,
    )
    return everything.of_alphabets(TEST_5) if split == "5" else everything.without_alphabets(TEST_5)


def to_28x28(images: np.ndarray) -> np.ndarray:
    """Sample the 105x105 originals at row floor(3.75 r) and column floor(3.75 c).

    These are the images of Generative Matching Networks (Bartunov & Vetrov 2016), on which the published
    likelihoods were measured.

    Args:
        images: boolean ink [..., 105, 105].

    Returns:
        Ink of the same dtype [..., 28, 28].

    Raises:
        ValueError: another image size.
    """
    if images.ndim < 2 or images.shape[-2:] != (105, 105):
        raise ValueError(f"images: expected shape [..., 105, 105], got {list(images.shape)}")
    pick = np.floor(3.75 * np.arange(28)).astype(int)
    return images[..., pick[:, None], pick]


def to_26x26(images: np.ndarray) -> np.ndarray:
    """Give the largest of each block of 4x4 of the 105x105 originals, without their last row and column.

    These are, as far as is told, the images of Reed et al. 2018 and of the public re-implementation of VMA;
    strokes are wider than in `to_28x28`.

    Args:
        images: boolean ink [..., 105, 105].

    Returns:
        Ink of the same dtype [..., 26, 26].

    Raises:
        ValueError: another image size.
    """
    if images.ndim < 2 or images.shape[-2:] != (105, 105):
        raise ValueError(f"images: expected shape [..., 105, 105], got {list(images.shape)}")
    blocks = images[..., :104, :104].reshape(*images.shape[:-2], 26, 4, 26, 4)
    return blocks.max((-3, -1))


SIDES = {28: to_28x28, 26: to_26x26}


def _half(root: Path, half: str, side: int, download: bool) -> Characters:
    prepared = root / ("omniglot" if side == 28 else f"omniglot-{side}") / f"{half}.npz"
    if prepared.exists():
        arrays = read_npz(prepared, ("images", "alphabet", "character"))
    else:
        arrays = _prepare(root, half, side, prepared, download)
        keep_npz(prepared, **arrays)
    try:
        names, alphabets = (tuple(map(str, arrays[key].tolist())) for key in ("character", "alphabet"))
        check_28x28("images", arrays["images"], side=side)
        return Characters(arrays["images"], names, alphabets)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prepared}: {error}") from error


def _prepare(root: Path, half: str, side: int, prepared: Path, download: bool) -> dict[str, np.ndarray]:
    """Make the arrays of the prepared file from the originals."""
    originals = root / "omniglot-py" / f"images_{half}"
    if not originals.is_dir():
        if not download:
            raise FileNotFoundError(f"data_dir: expected {prepared} or {originals}, found neither")
        _download(root, half, prepared, originals)
    from PIL import Image  # comes with torchvision; slow to import

    characters = sorted(
        path for folder in _visible(originals, "*") for path in _visible(folder, "*") if path.is_dir()
    )
    if not characters:
        raise FileNotFoundError(f"data_dir: expected {originals}/<alphabet>/<character>/*.png, found no character")
    drawings = [sorted(_visible(folder, "*.png")) for folder in characters]
    examples = len(drawings[0])
    images = np.empty((len(characters), examples, side, side), np.uint8)
    for row, (folder, paths) in enumerate(zip(characters, drawings, strict=True)):
        if len(paths) != examples or not paths:
            raise ValueError(f"{folder}: expected {examples or 'at least one'} drawings, got {len(paths)}")
        for column, path in enumerate(paths):
            try:
                with Image.open(path) as drawing:
                    ink = ~np.asarray(drawing.convert("1"))  # the originals are black on white
                images[row, column] = SIDES[side](ink)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: expected a 105x105 drawing ({error})") from error
    return {
        "images": images,
        "alphabet": np.array([folder.parent.name for folder in characters]),
        "character": np.array([folder.name for folder in characters]),
    }


def _visible(folder: Path, pattern: str) -> list[Path]:
    """List a folder without hidden files: a Mac leaves `._*` beside every file that it copies."""
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]


@contextmanager
def _unfinished(root: Path) -> Iterator[str]:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        yield folder


def _download(root: Path, half: str, prepared: Path, originals: Path) -> None:
    from torchvision.datasets import Omniglot  # seconds to import

    try:
        # Unpacked elsewhere and moved: an interrupted download must not look like a small data set.
        with made_for(root), _unfinished(root) as unfinished:
            Omniglot(unfinished, background=half == "background", download=True)
            originals.parent.mkdir(exist_ok=True)
            os.replace(Path(unfinished) / "omniglot-py" / originals.name, originals)
    except (OSError, RuntimeError) as error:  # URLError and a wrong checksum
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"data_dir: expected {prepared} or {originals}, found neither, and the download failed ({reason}); "
            "name the folder that has them, here or in VMA_DATA"
        ) from error
