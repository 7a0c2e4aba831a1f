"""From picture files to arrays of pixels: what is read, how it is turned, resized, cropped and binarised."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np

Mode = Literal["binary", "grey", "colour"]
MODES = ("binary", "grey", "colour")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x112, 258, 262  # tags of exif and of TIFF
WHITE_IS_ZERO = 0  # of PHOTOMETRIC
INK_SHARE = 0.3  # of a pixel, from which on it is ink: thin strokes stay when an image shrinks


class Unreadable(ValueError):
    """A file that is no picture, or a damaged one."""


def read_picture(path: Path, mode: Mode) -> np.ndarray:
    """Read a picture as it is meant to be seen: turned by its exif orientation, what is transparent on white.

    Args:
        path: of the file; of several frames the first is taken.
        mode: "colour" for three colours, else one.

    Returns:
        uint8 0..255 [height, width, C].

    Raises:
        Unreadable: not a picture, a damaged one, or one of numbers that have no known white.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import

    try:
        # Read as a stream: of files by name Pillow maps some kinds into memory, and gets turned ones wrong.
        with path.open("rb") as stream, Image.open(stream) as picture:
            check_key(picture)
            picture.load()
            return turned(from_pillow(picture, mode), picture.getexif().get(ORIENTATION, 1))
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error
    except Exception as error:  # of many kinds, for files that are damaged, or too large to unpack
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else reason
        raise Unreadable(f"{path}: expected a picture, got a file that cannot be read ({reason})") from error


def turned(image: np.ndarray, orientation: object) -> np.ndarray:
    """Turn pixels [height, width, C] upright, by the orientation of exif; one that is not known turns nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def check_key(picture: Any) -> None:
    """Refuse colours of 16 bits of which one is transparent: Pillow keeps 8 bits, which no longer tell it."""
    cut = any("16" in str(tile[3]) for tile in picture.tile)
    if cut and picture.mode == "RGB" and "transparency" in picture.info:
        raise Unreadable("expected 8 bits per colour where one colour is transparent, got 16; save it with alpha")


def from_pillow(picture: Any, mode: Mode) -> np.ndarray:
    """The pixels of a picture that is opened already, uint8 0..255 [height, width, C]."""
    from PIL import Image

    of_png = picture.mode == "I" and getattr(picture, "format", None) == "PNG"  # which has no 32 bits
    if picture.mode.startswith("I;16") or of_png:  # which Pillow would cut off at 255
        picture = Image.fromarray(of_16_bits(picture))
    elif picture.mode in ("F", "I"):
        raise Unreadable("expected 8 or 16 bits, got 32, whose white is not known")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    values = np.asarray(picture.convert("RGB" if mode == "colour" else "L"))
    return values if values.ndim == 3 else values[..., None]


def of_16_bits(picture: Any) -> np.ndarray:
    """The pixels of a grey picture of 9 to 16 bits, uint8 0..255 [height, width]; what is transparent is white."""
    values = np.asarray(picture).astype(np.int64)
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    white = 2 ** int(tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    if values.min() < 0 or values.max() > white:
        raise Unreadable(f"expected values from 0 to {white}, got values from {values.min()} to {values.max()}")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    if isinstance(key := picture.info.get("transparency"), int):
        values = np.where(values == key, white, values)
    return (values * 255 / white).round().astype(np.uint8)


def coloured(image: np.ndarray, mode: Mode) -> np.ndarray:
    """An image [height, width, C] of bytes with as many colours as the mode has."""
    from PIL import Image

    wanted = 3 if mode == "colour" else 1
    if image.shape[-1] == wanted:
        return image
    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    values = np.asarray(picture.convert("RGB" if mode == "colour" else "L"))
    return values if values.ndim == 3 else values[..., None]


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a picture until it just covers the size, and crop what sticks out, half on either side.

    Args:
        image: uint8 0..255 [height, width, C].
        size: (height, width).

    Returns:
        uint8 0..255 [*size, C].
    """
    from PIL import Image, ImageOps

    if image.shape[:2] == size:
        return image
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    made = np.asarray(ImageOps.fit(picture, (size[1], size[0]), method=Image.Resampling.BOX, centering=(0.5, 0.5)))
    return made if made.ndim == 3 else made[..., None]


class Canvas:
    """Takes pictures one after the other, and keeps of each no more than the size that it is brought to.

    "binary": each is cut at half of the way from black to white, and then shrunk; a pixel is ink (1) if three
    tenths of it are. Paper is what covers most of all pictures, black or white.

    Args:
        size: (height, width) of the result; None if all have the same.
        mode: see `folder.load`.
    """

    def __init__(self, size: tuple[int, int] | None, mode: Mode) -> None:
        self.size, self.mode = size, mode
        self._images: list[np.ndarray] = []
        self._light: list[float] = []

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._images)

    def add(self, image: np.ndarray) -> None:
        """Take a picture, uint8 0..255 [height, width, C], of three colours for "colour" and of one otherwise."""
        if self.mode == "binary":
            dark = image < 128
            self._light.append(1 - float(dark.mean()))
            image = dark.astype(np.uint8) * 255
        self._images.append(image if self.size is None else fitted(image, self.size))

    def pixels(self, names: Sequence[object]) -> np.ndarray:
        """All pictures, uint8 [N, C, height, width]: {0, 1} for "binary", else 0..255.

        Args:
            names: of the pictures, for errors.

        Raises:
            ValueError: pictures of different sizes.
        """
        if self.size is None:
            check_common_size([image.shape for image in self._images], names)
        images = np.stack(self._images).transpose(0, 3, 1, 2)
        if self.mode != "binary":
            return images
        ink_is_dark = np.mean(self._light) > 0.5
        return ((images if ink_is_dark else 255 - images) >= INK_SHARE * 255).astype(np.uint8)


def check_common_size(shapes: Sequence[tuple[int, ...]], names: Sequence[object]) -> None:
    """Refuse pictures of different sizes."""
    first = shapes[0][:2]
    for shape, name in zip(shapes, names, strict=True):
        if shape[:2] != first:
            raise ValueError(
                f"size: expected one to bring all images to, as they differ, got none; {names[0]} is {first[0]} "
                f"high and {first[1]} wide, {name} {shape[0]} and {shape[1]}"
            )


def check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Refuse what is no size; a number is that of a square."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and side >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"size: expected a number of pixels, or height and width, got {size!r}")
    return int(sides[0]), int(sides[1])
