"""Typed records of images: characters of many classes, and single images with labels."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vma_pyro.data.image_checks import check_binary, check_grey, look_at_ink


@dataclass(frozen=True, eq=False)
class Characters:
    """Holds the examples of many classes, as in Omniglot.

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
        """Count the classes."""
        return len(self.images)

    def of_alphabets(self, alphabets: Collection[str]) -> Characters:
        """Keep the classes of these alphabets, in order."""
        unknown = set(alphabets) - set(self.alphabets)
        if unknown:
            raise ValueError(f"alphabets: expected some of {sorted(set(self.alphabets))}, got {sorted(unknown)}")
        return self._keep([a in alphabets for a in self.alphabets])

    def without_alphabets(self, alphabets: Collection[str]) -> Characters:
        """Keep the classes of all other alphabets, in order."""
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
    """Holds characters in shades of grey: float32 from 0 to 1 (ink), for a model with a likelihood for them.

    Raises:
        ValueError: other dtype, shape or values, or another number of names than classes.
    """

    def _check_images(self) -> None:
        check_grey("images", self.images, ndim=4)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Holds single images with labels, as in MNIST.

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
        """Shuffle the images: files may be sorted by label, and a part of them would be of few."""
        order = np.random.default_rng(seed).permutation(len(self))
        shuffled = copy.copy(self)
        shuffled.__dict__.update(images=self.images[order], labels=self.labels[order])
        return shuffled

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)
