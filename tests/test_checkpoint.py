"""Checkpoints: whole or not at all, tensors only, and every misfit named."""

import errno
import os
import pickle
import re
import subprocess
import time

import numpy as np
import processes
import pytest
import torch
from torch import nn

from vma_pyro import ConvNetworks, Guide, Model, models
from vma_pyro._system import checkpoint
from vma_pyro.data.prepared import read_npz, write_npz
from vma_pyro.models.packing import packed, round_to, unpacked


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


CONTENT = {"weights": {"a": torch.linspace(0, 1, 300), "b": torch.arange(17)}, "progress": {"update": 3}}


def of_before(path):
    """As files were written that have no seal."""
    torch.save({"format": checkpoint.FORMAT, "version": 1, **CONTENT}, path)


@pytest.mark.parametrize("write", [lambda path: checkpoint.save(path, CONTENT), of_before])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_byte_is_refused_or_changes_nothing(write, mmap, tmp_path):
    path = tmp_path / "c.pt"
    write(path)
    whole = path.read_bytes()
    lines = []
    for place in range(0, len(whole), 41):
        for flip in (0x01, 0xFF):
            path.write_bytes(bytes(b ^ flip if n == place else b for n, b in enumerate(whole)))
            try:
                content = checkpoint.load(path, mmap=mmap)
            except ValueError as error:
                lines.append(str(error))
                continue
            assert content["progress"] == CONTENT["progress"]
            assert all(torch.equal(content["weights"][name], value) for name, value in CONTENT["weights"].items())
    assert len(lines) > 60
    assert all(re.fullmatch(".*: expected a whole checkpoint, got a damaged file", line) for line in lines)


def test_many_flipped_bytes_in_the_weights_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(str(path), {"weights": torch.zeros(10_000)})
    damaged = bytearray(path.read_bytes())
    for place in range(5_000, 25_000, 50):  # 400 of them, within the tensor
        damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="c.pt: expected a whole checkpoint, got a damaged file"):
        checkpoint.load(str(path))


def test_flipped_bytes_of_prepared_data_are_refused_or_change_nothing(tmp_path):
    path = tmp_path / "d.npz"
    images = np.arange(784, dtype=np.uint8).reshape(1, 28, 28) % 7
    write_npz(str(path), images=images, labels=np.zeros(1, np.uint8))
    whole, lines = path.read_bytes(), []
    for place in range(0, len(whole), 11):
        path.write_bytes(bytes(b ^ 0xFF if n == place else b for n, b in enumerate(whole)))
        try:
            found = read_npz(path, ["images"])["images"]
        except ValueError as error:
            lines.append(str(error))
            continue
        assert np.array_equal(found, images)
    assert len(lines) > 10
    assert all(line.startswith(f"{path}: expected ") for line in lines)


SAVES = """
import sys, torch
from vma_pyro import ConvNetworks, Guide, Model, models
from vma_pyro._system import checkpoint

for update in range(10**9):
    checkpoint.save("c.pt", {"update": update, "weights": torch.full((2_000_000,), float(update))})
"""


def test_killed_while_it_saves_it_leaves_a_whole_file(tmp_path):
    script, path = tmp_path / "saves.py", tmp_path / "c.pt"
    script.write_text(SAVES)
    for wait in (0.0, 0.01):
        process = processes.start(script, cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".c.pt.*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        if path.exists():
            content = checkpoint.load(path)
            assert bool((content["weights"] == content["update"]).all())
    checkpoint.save(path, {"update": -1})
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "saves.py"]  # what was left over is gone


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_leaves_the_previous_checkpoint(full_disk):
    path = full_disk / "c.pt"
    checkpoint.save(path, {"update": 1})
    with pytest.raises(
        OSError, match=r"^checkpoint: expected to be able to write .*c.pt, got 'No space left on device'$"
    ):
        checkpoint.save(path, {"update": 2, "weights": torch.zeros(1_000_000)})
    assert checkpoint.load(path)["update"] == 1
    assert os.listdir(full_disk) == ["c.pt"]
    checkpoint.save(path, {"update": 3})


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


@pytest.mark.parametrize(("bits", "share"), [(16, 0.6), (8, 0.45)])
def test_weights_are_kept_in_fewer_bits_only_where_these_hold_them(tmp_path, bits, share):
    """Model and guide share theirs, which the file holds once."""
    networks = ConvNetworks(16, width=0.25, refinement=4)
    pair = Model(networks), Guide(networks)
    models.save(tmp_path / "whole.pt", pair)
    with pytest.raises(ValueError, match=f"^bits: expected weights that {bits} bits hold exactly, got others in "):
        models.save(tmp_path / "few.pt", pair, bits=bits)
    assert not (tmp_path / "few.pt").exists()
    near = models.rounded(pair, bits)
    assert near[0].networks is near[1].networks is not networks
    models.save(tmp_path / "few.pt", near, bits=bits)
    again = models.as_one(models.load(tmp_path / "few.pt")).state_dict()
    for name, value in models.as_one(pair).state_dict().items():
        assert again[name].dtype == value.dtype
        if bits == 16 or value.dim() < 2:
            assert torch.equal(again[name], value.half().float())
        else:  # half a step of the row's scale; what is beyond 127 of them, as the scale is cut off, one
            most = value.flatten(1).abs().amax(1)
            off = (again[name] - value).flatten(1).abs().amax(1)
            assert bool((off <= 1.01 * most / 127).all())
            assert (again[name] - value).abs().mean() <= 0.3 * most.mean() / 127
    whole, few = ((tmp_path / name).stat().st_size for name in ("whole.pt", "few.pt"))
    assert few < share * whole


def test_codes_of_any_weights_are_their_own_codes_again():
    """Rows of zeros, of one number, of tiny and of large ones."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-6, 1.0, 300.0):
        weights = scale * torch.randn(50, 3, 2, 2, generator=generator)
        weights[3] = 0.0
        weights[4] = weights[4, 0, 0, 0]
        once = round_to(weights, 8)
        assert torch.equal(round_to(once, 8), once)
        assert torch.equal(unpacked(packed({"w": once}, 8))["w"], once)
        assert bool((once - weights).abs().max() <= weights.abs().max() / 200)
    with pytest.raises(ValueError, match="^bits: expected 16 or 8, got 4$"):
        round_to(weights, 4)
    for malformed in (
        {"codes": torch.zeros(2, 2)},
        {"codes": torch.zeros(2, 2).char(), "scale": torch.ones(3)},
        {},
    ):
        with pytest.raises(
            ValueError, match="^expected weights or codes with a scale for each row, got others in 'w'"
        ):
            unpacked({"w": malformed})
