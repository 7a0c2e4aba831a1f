"""Checks of arrays of images: what is refused, and the ink that is warned of as it may be meant."""

from __future__ import annotations

import warnings

import numpy as np

from vma_pyro.memory.checks import MOST_INK


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
    found = []
    if share.mean() > MOST_INK:
        advice = f"give 1 - {name} if the drawings are dark on light"
        found.append(f"less ink (1) than paper (0), got {share.mean():.0%} ink; {advice}")
    elif images.dtype == np.uint8 and dark > 0:  # a photograph may well be dark
        most = f"more than {MOST_INK:.0%} ink in {dark} of {share.size} images"
        found.append(f"less ink (1) than paper (0), got {most}; give 1 - image for those that are inverted")
    if empty:
        found.append(f"ink in every image, got {empty} of {share.size} images without; leave these out")
    for text in found:
        warnings.warn(f"{name}: expected {text}", stacklevel=4)


def _check_shape(name: str, images: np.ndarray, ndim: int) -> None:
    if images.ndim != ndim or images.shape[-2:] != (28, 28):
        lead = "classes, examples" if ndim == 4 else "N"
        raise ValueError(f"{name}: expected shape [{lead}, 28, 28], got {list(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"{name}: expected at least one image, got shape {list(images.shape)}")
