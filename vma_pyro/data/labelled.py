"""Labelled images that torchvision downloads, as few-shot sets: each label is a class.

======= ============================================ ======= =======
name    images                                       classes mode
======= ============================================ ======= =======
emnist  letters and digits ("balanced"), 28x28       47      grey
kmnist  Japanese characters, 28x28                   10      grey
fashion clothes, 28x28                               10      grey
cifar10 photographs, 32x32                           10      colour
svhn    house numbers, 32x32                         10      colour
======= ============================================ ======= =======
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vma_pyro.data.pictures import MODES, Canvas, Mode, check_size, coloured
from vma_pyro.data.prepared import data_root, made_for
from vma_pyro.data.records import ImageClasses


class Source(NamedTuple):
    """Says how torchvision loads a set.

    Attributes:
        kind: name of its class.
        options: of it, beside the folder and the download.
        mode: of the images as they are.
        folder: below the root, that its files are in.
    """

    kind: str
    options: dict[str, Any]
    mode: Mode
    folder: str


SOURCES = {
    "emnist": Source("EMNIST", {"split": "balanced", "train": True}, "grey", "EMNIST"),
    "kmnist": Source("KMNIST", {"train": True}, "grey", "KMNIST"),
    "fashion": Source("FashionMNIST", {"train": True}, "grey", "FashionMNIST"),
    "cifar10": Source("CIFAR10", {"train": True}, "colour", "cifar-10-batches-py"),
    "svhn": Source("SVHN", {"split": "train"}, "colour", "svhn"),
}
NAMES = tuple(SOURCES)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    mode: Mode | None = None,
    download: bool = True,
) -> ImageClasses:
    """Load the training images of a set, label by label.

    Args:
        name: one of `NAMES`.
        root: folder of the data; None takes the environment variable VMA_DATA, else a cache in the home folder.
        size: to bring images to, see `folder.load`; None leaves them as they are.
        mode: "binary", "grey" or "colour"; None for what they are.
        download: fetch the files where they are not there.

    Returns:
        Classes in the order of their labels.

    Raises:
        ValueError: another name or mode, or a file that is damaged.
        FileNotFoundError: no data, and downloading is not wanted or failed.
    """
    if name not in SOURCES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    source = SOURCES[name]
    mode = source.mode if mode is None else mode
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    images, labels, names = _read(source, data_root(root), download)
    canvas = Canvas(check_size(size), mode)
    order = np.argsort(labels, kind="stable")
    for image in images[order]:
        canvas.add(coloured(image, mode))
    present, counts = np.unique(labels, return_counts=True)
    chosen = tuple(names[label] if label < len(names) else str(label) for label in present.tolist())
    return ImageClasses(canvas.pixels(range(len(order))), counts, chosen, chosen, 1 if mode == "binary" else 8)


def _read(source: Source, root: Path, download: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [N, height, width, C], labels [N] and the names of the labels."""
    import torchvision.datasets  # seconds to import

    kind: Callable[..., Any] = getattr(torchvision.datasets, source.kind)
    where = root / source.folder if source.kind == "SVHN" else root
    try:
        with made_for(root / source.folder):
            found = kind(str(where), download=download, **source.options)
    # Absent, URLError or a wrong checksum; torchvision reads damaged files with assertions.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"data_dir: expected {source.kind}'s files in {root / source.folder}, found none that can be read "
            f"({reason})"
        ) from error
    images = np.asarray(found.data)
    if source.kind == "EMNIST":
        images = images.transpose(0, 2, 1)  # which are stored on their side
    elif source.kind == "SVHN":
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    labels = np.asarray(found.labels if source.kind == "SVHN" else found.targets)
    return images, labels, [str(name) for name in getattr(found, "classes", [])]
