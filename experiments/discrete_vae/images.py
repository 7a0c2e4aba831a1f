"""The images: MNIST and Omniglot, binary once and for all, split into as many as the papers have.

The papers redraw each pixel from its grey value at every reading; the prepared files are binary already. Figures
on the two differ by some nats, and only rankings and gaps compare. Prepared files may be in the order of classes,
so all are mixed by a fixed seed first.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vma_pyro.data import mnist, omniglot

DATA_SETS = ("mnist", "omniglot")


class Images(NamedTuple):
    """Binary images [N, 784] to train on, to compare on, and to test on once."""

    train: UInt8[Tensor, "N P"]
    validation: UInt8[Tensor, "N P"]
    test: UInt8[Tensor, "N P"]

    @property
    def mean(self) -> Float[Tensor, " P"]:
        """The mean image of the training set."""
        return self.train.float().mean(0)


def load(data: str, root: str | Path | None = None) -> Images:
    """Load a data set.

    Args:
        data: "mnist" (50,000 / 10,000 / 10,000) or "omniglot" (23,000 / 1,345 / 8,115 drawings of all 1,623
            characters; the papers' last part has 8,070).
        root: folder of the data, as for `mnist.load`.

    Raises:
        ValueError: another name, or a file that is damaged.
        FileNotFoundError: no data, and downloading failed.
    """
    if data == "mnist":
        training = _mixed(mnist.load(root, split="train").images)
        train, validation = np.split(training, [len(training) * 5 // 6])
        test = _mixed(mnist.load(root, split="test").images)
    elif data == "omniglot":
        halves = [omniglot.load(root, split=half).images for half in ("background", "evaluation")]
        drawings = _mixed(np.concatenate([half.reshape(-1, 28, 28) for half in halves]))
        cuts = [len(drawings) * part // 32_460 for part in (23_000, 24_345)]
        train, validation, test = np.split(drawings, cuts)
    else:
        raise ValueError(f"data: expected one of {', '.join(DATA_SETS)}, got {data!r}")
    return Images(*(torch.from_numpy(part).flatten(1) for part in (train, validation, test)))


def _mixed(images: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = images[np.random.default_rng(0).permutation(len(images))]
    return mixed


class Batches:
    """Batches of images in an order that the seed decides; all are seen before any is seen again."""

    def __init__(self, images: UInt8[Tensor, "N P"], size: int, seed: int) -> None:
        if len(images) < size:
            raise ValueError(f"data: expected at least {size} training images, got {len(images)}")
        self.images, self.size = images, size
        self.digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.position = 0

    def next(self) -> Float[Tensor, "B P"]:
        """Take the next batch."""
        if self.position + self.size > len(self.order):
            self.order = torch.randperm(len(self.images), generator=self.generator)
            self.position = 0
        chosen = self.order[self.position : self.position + self.size]
        self.position += self.size
        return self.images[chosen].float()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        noise = self.generator.get_state()
        return {"noise": noise, "order": self.order, "position": self.position, "images": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: it is of other images.
        """
        if state.get("images", self.digest) != self.digest:  # the first checkpoints did not say
            raise ValueError("data_dir: expected the images that the run began with, got others")
        self.generator.set_state(state["noise"])
        self.order, self.position = state["order"], state["position"]
