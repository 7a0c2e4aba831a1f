"""Checks of arrays of images: what is refused, and the ink that is warned of as it may be meant."""

from __future__ import annotations

import warnings

import numpy as np

from vma_pyro.memory.checks import MOST_INK


def check_binary(name: str, images: np.ndarray, *, ndim: int) -> None:
    """Refuse anything but uint8 {0, 1} with `ndim` dimensions, the last two of them height and width."""
    _check_shape(name, images, ndim)
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: expected dtype uint8, got {images.dtype}")
    if images.max() > 1:
        raise ValueError(f"{name}: expected binary values 0 and 1, got values up to {images.max()}")


def check_grey(name: str, images: np.ndarray, *, ndim: int) -> None:
    """Refuse anything but values from 0 to 1 with `ndim` dimensions, the last two of them height and width."""
    _check_shape(name, images, ndim)
    if images.dtype != np.float32:
        raise ValueError(f"{name}: expected dtype float32, got {images.dtype}")
    _check_shares(name, images)


def _check_shares(name: str, images: np.ndarray) -> None:
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # NaN is refused as well
        raise ValueError(f"{name}: expected values from 0 to 1, got {low:g} to {high:g}")


def check_28x28(name: str, images: np.ndarray, *, side: int = 28) -> None:
    """Refuse images of another size than those of Omniglot and MNIST."""
    if images.shape[-2:] != (side, side):
        raise ValueError(f"{name}: expected shape [..., {side}, {side}], got {list(images.shape)}")


def check_pixels(name: str, pixels: np.ndarray, bits: int) -> None:
    """Refuse anything but images [N, C, height, width] of 1 or 3 colours, of a type that their bits go with."""
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"{name}: expected at least one image, [N, 1 or 3 colours, height, width], got {list(pixels.shape)}"
        )
    if bits not in (1, 8):
        raise ValueError(f"bits: expected 1 or 8, got {bits}")
    if pixels.dtype == np.float32:
        _check_shares(name, pixels)
    elif pixels.dtype != np.uint8:
        raise ValueError(f"{name}: expected dtype uint8 or float32, got {pixels.dtype}")
    elif bits == 1 and pixels.max() > 1:
        raise ValueError(
            f"{name}: expected binary values 0 and 1, got values up to {pixels.max()}; say bits=8 of 8-bit images"
        )
    if pixels.dtype == np.float32 and bits == 8:
        raise ValueError(f"{name}: expected dtype uint8 with bits=8, got float32")


def look_at_ink(name: str, images: np.ndarray, *, stacklevel: int = 4) -> None:
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
        warnings.warn(f"{name}: expected {text}", stacklevel=stacklevel)


def _check_shape(name: str, images: np.ndarray, ndim: int) -> None:
    if images.ndim != ndim:
        lead = "classes, examples" if ndim == 4 else "N"
        raise ValueError(f"{name}: expected shape [{lead}, height, width], got {list(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"{name}: expected at least one image, got shape {list(images.shape)}")
