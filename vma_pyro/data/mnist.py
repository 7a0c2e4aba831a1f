"""MNIST, binarised once (LeCun et al. 1998).

A prepared file is looked for first (`mnist/train.npz`, `mnist/test.npz` below the root, with `images` uint8 {0, 1}
[N, 28, 28] and `labels` uint8 [N]); else torchvision's MNIST is downloaded, binarised with a fixed seed, and kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vma_pyro.data.image_checks import check_28x28
from vma_pyro.data.prepared import data_root, keep_npz, made_for, read_npz
from vma_pyro.data.records import LabelledImages

SPLITS = ("train", "test")
BINARISATION_SEED = {"train": 0, "test": 1}


def load(root: str | Path | None = None, *, split: str, download: bool = True) -> LabelledImages:
    """Load MNIST's digits.

    Args:
        root: folder of the data; None takes the environment variable VMA_DATA, else a cache in the home folder.
        split: "train" (60,000 images) or "test" (10,000).
        download: fetch the originals when neither they nor prepared files are there.

    Returns:
        Images uint8 {0, 1} [N, 28, 28] with labels.

    Raises:
        ValueError: unknown split, or a file that is damaged.
        FileNotFoundError: no data, and downloading is not wanted or failed.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = data_root(root)
    prepared = root / "mnist" / f"{split}.npz"
    if prepared.exists():
        arrays = read_npz(prepared, ("images", "labels"))
    else:
        arrays = _prepare(root, split, prepared, download)
        keep_npz(prepared, **arrays)
    try:
        check_28x28("images", arrays["images"])
        return LabelledImages(arrays["images"], arrays["labels"])
    except ValueError as error:
        raise ValueError(f"{prepared}: {error}") from error


def binarise(grey: np.ndarray, *, seed: int) -> np.ndarray:
    """Draw each pixel once from a Bernoulli with its grey value as probability (Salakhutdinov & Murray 2008).

    Args:
        grey: uint8 0..255, any shape.
        seed: of the fixed draw.

    Returns:
        uint8 {0, 1} of the same shape.
    """
    return (np.random.default_rng(seed).random(grey.shape, np.float32) < grey / np.float32(255)).astype(np.uint8)


def _prepare(root: Path, split: str, prepared: Path, download: bool) -> dict[str, np.ndarray]:
    from torchvision.datasets import MNIST  # seconds to import

    try:
        with made_for(root / "MNIST" / "raw"):
            originals = MNIST(str(root), train=split == "train", download=download)
    # Absent, URLError or a wrong checksum; torchvision reads damaged files with assertions.
    except (OSError, RuntimeError, AssertionError, TypeError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raw = root / "MNIST" / "raw"
        if (raw / f"{'train' if split == 'train' else 't10k'}-images-idx3-ubyte").exists():
            raise ValueError(f"{raw}: expected MNIST's files, got some that cannot be read ({reason})") from error
        raise FileNotFoundError(f"data_dir: expected {prepared} or {raw}, found neither ({reason})") from error
    images = binarise(originals.data.numpy(), seed=BINARISATION_SEED[split])
    return {"images": images, "labels": originals.targets.numpy().astype(np.uint8)}
