"""Sets of labelled images: torchvision's own readers on small files in its formats, made here."""

import pickle
import struct

import numpy as np
import pytest
import torchvision.datasets

from vma_pyro.data import divide, labelled, load_split

LABELS = np.array([3, 1, 3, 0, 1, 1, 2, 2], np.uint8)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), *shape)).astype(np.uint8)


def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


def write_idx(root, name):
    folder = {"emnist": "EMNIST", "kmnist": "KMNIST", "fashion": "FashionMNIST"}[name]
    stems = (
        [("emnist-balanced-train", "emnist-balanced-train")]
        if name == "emnist"
        else [("train",) * 2, ("t10k",) * 2]
    )
    for stem, _ in stems:
        idx(root / folder / "raw" / f"{stem}-images-idx3-ubyte", images(28, 28))
        idx(root / folder / "raw" / f"{stem}-labels-idx1-ubyte", LABELS)


def write_cifar(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = images(3, 32, 32)
    for number in range(1, 6):
        part = {"data": rows.reshape(len(LABELS), -1), "labels": LABELS.tolist()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(part))
    (folder / "test_batch").write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird", "cat"]}))
    kind = torchvision.datasets.CIFAR10  # whose checksums are those of the whole set
    monkeypatch.setattr(kind, "train_list", [[name, None] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, None] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    return rows


def write_svhn(root, monkeypatch):
    from scipy.io import savemat

    (root / "svhn").mkdir(parents=True)
    rows = images(3, 32, 32)
    savemat(root / "svhn" / "train_32x32.mat", {"X": rows.transpose(2, 3, 1, 0), "y": LABELS[:, None]})
    kind = torchvision.datasets.SVHN
    url, file, _ = kind.split_list["train"]
    monkeypatch.setattr(kind, "split_list", kind.split_list | {"train": [url, file, None]})
    return rows


ORDER = np.argsort(LABELS, kind="stable")


@pytest.mark.parametrize("name", ["emnist", "kmnist", "fashion"])
def test_grey_images_by_label(tmp_path, name):
    write_idx(tmp_path, name)
    found = labelled.load(name, tmp_path, download=False)
    expected = images(28, 28)[ORDER]
    if name == "emnist":  # whose files lie on their side
        expected = expected.transpose(0, 2, 1)
    assert (found.pixels[:, 0] == expected).all()
    assert found.counts.tolist() == [1, 3, 2, 2]
    assert found.bits == 8
    assert len(set(found.names)) == 4
    binary = labelled.load(name, tmp_path, mode="binary", size=14, download=False)
    assert binary.pixels.shape == (8, 1, 14, 14)
    assert binary.bits == 1


@pytest.mark.parametrize(("name", "write"), [("cifar10", write_cifar), ("svhn", write_svhn)])
def test_colour_images_by_label(tmp_path, monkeypatch, name, write):
    rows = write(tmp_path, monkeypatch)
    found = labelled.load(name, tmp_path, download=False)
    if name == "cifar10":  # five files of the same
        assert found.counts.tolist() == [5, 15, 10, 10]
        assert found.names == ("plane", "car", "bird", "cat")
        assert (found.pixels[0] == rows[ORDER[0]]).all()
    else:
        assert (found.pixels == rows[ORDER]).all()
    grey = labelled.load(name, tmp_path, mode="grey", size=(16, 20), download=False)
    assert grey.image_shape == (1, 16, 20)


def test_few_shot_sets_of_labels(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: None)
    parts = load_split("cifar10", tmp_path, size=16)
    assert sorted(name for part in parts for name in part.names) == ["bird", "car", "cat", "plane"]
    assert divide(labelled.load("cifar10", tmp_path, size=16)).test.names == parts.test.names


@pytest.mark.parametrize("name", labelled.NAMES)
def test_files_that_are_missing_or_damaged(tmp_path, name):
    kind = labelled.SOURCES[name].kind
    message = rf"^data_dir: expected {kind}'s files in .*, found none that can be read \(.*\)$"
    with pytest.raises(FileNotFoundError, match=message):
        labelled.load(name, tmp_path / "absent", download=False)
    assert not (tmp_path / "absent").exists()
    if name in ("kmnist", "emnist", "fashion"):
        write_idx(tmp_path, name)
        for path in tmp_path.rglob("*images*"):
            path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(FileNotFoundError, match=message):
            labelled.load(name, tmp_path, download=False)


def test_other_names_and_modes(tmp_path):
    with pytest.raises(
        ValueError, match="^data: expected one of emnist, kmnist, fashion, cifar10, svhn, got 'mnist'$"
    ):
        labelled.load("mnist", tmp_path)
    with pytest.raises(ValueError, match="^mode: expected one of binary, grey, colour, got 'rgb'$"):
        labelled.load("svhn", tmp_path, mode="rgb")
