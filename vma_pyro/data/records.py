"""Typed records of images: of many classes with any number of examples each, and single images with labels."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from vma_pyro.data.image_checks import check_binary, check_grey, check_pixels, look_at_ink


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """Holds the images of many classes, of any shape and in any numbers.

    Args:
        pixels: all images one after the other, class by class [N, C, height, width]: uint8 {0, 1}, 1 = ink
            (binary), uint8 0..255 (8 bits), or float32 from 0 to 1.
        counts: number of images of each class, int64 [classes], 1 or more.
        names: name of each class.
        groups: of each class, which splits never cut through; Omniglot's are alphabets.
        bits: 1 or 8, of uint8; float32 has none.

    Raises:
        ValueError: other dtype, shape or values, or other numbers of names, groups or images than classes.
    """

    pixels: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]
    groups: tuple[str, ...]
    bits: int = 1

    def __post_init__(self) -> None:
        """Check once, so that no consumer has to."""
        check_pixels("pixels", self.pixels, self.bits)
        self._check_classes()

    def _check_classes(self) -> None:
        counts = np.asarray(self.counts)
        if counts.dtype.kind not in "iu":
            raise ValueError(f"counts: expected whole numbers, got {counts.dtype}")
        counts = self.__dict__["counts"] = counts.astype(np.int64)
        if counts.ndim != 1 or counts.min(initial=1) < 1 or counts.sum() != len(self.pixels):
            raise ValueError(
                f"counts: expected 1 or more images for each class, {len(self.pixels)} in all, got "
                f"{counts.tolist()}"
            )
        for name in ("names", "groups"):
            if len(getattr(self, name)) != len(counts):
                raise ValueError(f"{name}: expected {len(counts)}, one per class, got {len(getattr(self, name))}")

    def __len__(self) -> int:
        """Count the classes."""
        return len(self.counts)

    @property
    def examples(self) -> int:
        """The number of images of the largest class."""
        return int(self.counts.max())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, height, width] of one image."""
        colours, height, width = self.pixels.shape[1:]
        return colours, height, width

    @property
    def full_names(self) -> tuple[str, ...]:
        """The name of each class, "group/name" where it is in a group with another name than its own."""
        pairs = zip(self.groups, self.names, strict=True)
        return tuple(name if group == name else f"{group}/{name}" for group, name in pairs)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Row of the first image of each class, int64 [classes]."""
        return np.cumsum(self.counts) - self.counts

    def of_groups(self, groups: Collection[str]) -> ImageClasses:
        """Keep the classes of these groups, in order."""
        groups = {groups} if isinstance(groups, str) else groups
        unknown = set(groups) - set(self.groups)
        if unknown:
            raise ValueError(f"groups: expected some of {sorted(set(self.groups))}, got {sorted(unknown)}")
        return self.of_classes([i for i, group in enumerate(self.groups) if group in groups])

    def without_groups(self, groups: Collection[str]) -> ImageClasses:
        """Keep the classes of all other groups, in order."""
        groups = {groups} if isinstance(groups, str) else groups
        return self.of_classes([i for i, group in enumerate(self.groups) if group not in groups])

    def of_classes(self, classes: Sequence[int]) -> ImageClasses:
        """Keep the classes of these numbers, in this order."""
        if not len(classes):
            raise ValueError("classes: expected at least one to be left, got none")
        rows = [np.arange(self.counts[i]) + self.offsets[i] for i in classes]
        kept = copy.copy(self)  # what has been named once is not named again for every part
        kept.__dict__.pop("offsets", None)
        kept.__dict__.update(
            pixels=self.pixels[np.concatenate(rows)],
            counts=np.asarray(self.counts)[list(classes)],
            names=tuple(self.names[i] for i in classes),
            groups=tuple(self.groups[i] for i in classes),
        )
        return kept

    def turned(self, turns: int, *, mirrored: bool = False) -> np.ndarray:
        """All images turned by quarters, and then perhaps mirrored, [N, C, width, height] after an odd number."""
        turned = np.rot90(self.pixels, turns, axes=(-2, -1))
        return np.flip(turned, axis=-1) if mirrored else turned

    def as_float(self, pixels: Tensor) -> Tensor:
        """Turn pixels of this record into the values that models take, float32 from 0 to 1."""
        return pixels.float() / 255 if self.bits == 8 else pixels.float()


@dataclass(frozen=True, eq=False, init=False)
class Characters(ImageClasses):
    """Holds binary drawings of many classes with the same number of examples each, as in Omniglot.

    Args:
        images: uint8 {0, 1}, 1 = ink, [classes, examples, height, width].
        names: name of each class.
        alphabets: alphabet of each class; splits never cut through one.

    Raises:
        ValueError: other dtype, shape or values, or another number of names than classes.
    """

    def __init__(self, images: np.ndarray, names: tuple[str, ...], alphabets: tuple[str, ...]) -> None:
        self._check_images(images)
        classes, examples = images.shape[:2]
        for name, values in (("names", names), ("alphabets", alphabets)):
            if len(values) != classes:
                raise ValueError(f"{name}: expected {classes}, one per class, got {len(values)}")
        look_at_ink("images", images, stacklevel=3)
        self.__dict__.update(
            pixels=images.reshape(classes * examples, 1, *images.shape[2:]),
            counts=np.full(classes, examples),
            names=names,
            groups=alphabets,
            bits=1,
        )

    def _check_images(self, images: np.ndarray) -> None:
        check_binary("images", images, ndim=4)

    @property
    def images(self) -> np.ndarray:
        """The images class by class, [classes, examples, height, width]."""
        return self.pixels.reshape(len(self), -1, *self.pixels.shape[2:])

    @property
    def alphabets(self) -> tuple[str, ...]:
        """The alphabet of each class."""
        return self.groups

    def of_alphabets(self, alphabets: Collection[str]) -> Characters:
        """Keep the classes of these alphabets, in order."""
        alphabets = {alphabets} if isinstance(alphabets, str) else alphabets
        unknown = set(alphabets) - set(self.alphabets)
        if unknown:
            raise ValueError(f"alphabets: expected some of {sorted(set(self.alphabets))}, got {sorted(unknown)}")
        return self.of_groups(alphabets)  # type: ignore[return-value]  # a copy of its own kind

    def without_alphabets(self, alphabets: Collection[str]) -> Characters:
        """Keep the classes of all other alphabets, in order."""
        return self.without_groups(alphabets)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False, init=False)
class GreyCharacters(Characters):
    """Holds characters in shades of grey: float32 from 0 to 1 (ink), for a model with a likelihood for them.

    Raises:
        ValueError: other dtype, shape or values, or another number of names than classes.
    """

    def _check_images(self, images: np.ndarray) -> None:
        check_grey("images", images, ndim=4)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Holds single images with labels, as in MNIST.

    Args:
        images: uint8 {0, 1}, 1 = ink, [N, height, width].
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
        """Shuffle the images: files may be sorted by label, and a part of them would be of few."""
        order = np.random.default_rng(seed).permutation(len(self))
        shuffled = copy.copy(self)
        shuffled.__dict__.update(images=self.images[order], labels=self.labels[order])
        return shuffled

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)
