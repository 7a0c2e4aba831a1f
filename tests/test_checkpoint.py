"""Checkpoints: whole or not at all, tensors only, and every misfit named."""

import errno
import os
import pickle

import pytest
import torch
from torch import nn

from vma_pyro import checkpoint


def test_round_trip(tmp_path):
    content = {"weights": {"a": torch.arange(3)}, "progress": {"update": 3, "nll": 1.5}, "names": ["x"]}
    checkpoint.save(tmp_path / "c.pt", content)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert (loaded["weights"]["a"] == torch.arange(3)).all()
    assert loaded["progress"] == content["progress"]
    assert os.listdir(tmp_path) == ["c.pt"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o666 & ~mask  # as any new file


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: expected a file, found none at .*c.pt$"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="c.pt: expected") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="expected format 'vma_pyro.checkpoint', got another kind of file"):
        checkpoint.load(tmp_path / "c.pt")


def test_another_version(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="expected version 1, got 99$"):
        checkpoint.load(tmp_path / "c.pt")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    writer({"format": checkpoint.FORMAT, "version": 1, "weights": Bomb()}, tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match="c.pt: expected (tensors and plain values, refused other content|a whole checkpoint)"
    ):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"update": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^checkpoint: expected to be able to write .*c.pt, got 'No space left"):
        checkpoint.save(path, {"update": 2})
    assert checkpoint.load(path)["update"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_restore_names_the_tensor_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    fits = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"'weight' has shape \[3, 2\], got \[4, 2\]$"):
        checkpoint.restore(module, fits | {"weight": torch.ones(4, 2)}, name="this")
    with pytest.raises(ValueError, match=r"'bias' has shape \[3\], got none$"):
        checkpoint.restore(module, {"weight": torch.ones(3, 2)}, name="this")
    with pytest.raises(ValueError, match=r"'extra' has shape none, got \[1\]$"):
        checkpoint.restore(module, fits | {"extra": torch.ones(1)}, name="this")
    assert (module.weight == before).all()
    checkpoint.restore(module, fits, name="this")
    assert (module.weight == 1).all()
