"""The recall experiment with tiny arguments: results, loading, resuming, one-line errors; and its episodes."""

import json
import math
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from vma_pyro import MLPNetworks, models
from vma_pyro.data import RecallSampler

SCRIPT = Path(__file__).parents[1] / "experiments" / "mnist_recall.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    generator = np.random.default_rng(0)
    for split, number in (("train", 5010), ("test", 12)):
        images = (generator.random((number, 28, 28)) < 0.2).astype(np.uint8)
        np.savez(root / "mnist" / f"{split}.npz", images=images, labels=np.zeros(number, np.uint8))
    return root


def run(*arguments, data, cwd):
    return processes.run(SCRIPT, f"--data-dir={data}", *arguments, cwd=cwd)


def test_trains_tests_and_loads(data, tmp_path):
    result = run("--tiny", "--out=a", data=data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(row["images"], row["memory"]) for row in content["tests"]] == [
        ("training", 6),
        ("unseen", 6),
        ("unseen", 9),
    ]
    for row in content["tests"]:
        assert row["log_memory"] == math.log(row["memory"])
        assert row["nll"]["n"] >= 5
        assert 0 <= row["kl_address"]["mean"] <= row["log_memory"]
        assert 0 < row["right_class"]["mean"] < 1
    assert [line["update"] for line in content["curve"] if "bound" in line] == [1, 2, 3]
    assert (tmp_path / "a" / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a" / "report.md").read_text()
    assert f"`{content['command']}`" in page
    assert models.facts_of(tmp_path / "a" / "model.pt")["copies"] is True

    loaded = run("--tiny", "--load=a/model.pt", "--out=b", data=data, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert again["tests"] == content["tests"]

    for arguments, message in (
        (["--tiny", "--load=a/none.pt", "--out=c"], "--load: expected a file, found none at a/none.pt"),
        (
            ["--tiny", "--out=a", "--resume", "--no-copies"],
            "--resume: expected copies = True as in the checkpoint, got False",
        ),
        (["--out=d", "--memories", "13"], "--memories: expected 1 to 12, the number of images, got 13"),
    ):
        refused = run(*arguments, data=data, cwd=tmp_path)
        assert refused.stderr.splitlines()[-1] == f"error: {message}"
        assert refused.returncode == 1


def test_targets_are_entries_at_their_labels():
    images = (np.random.default_rng(0).random((30, 28, 28)) < 0.3).astype(np.uint8)
    sampler = RecallSampler(images, size=9, queries=4, seed=3)
    state = sampler.state_dict()
    first = sampler.sample()
    assert (first.memory.entries[first.labels] == first.x).all()
    assert len(first.labels.unique()) == 4
    assert len(first.memory.entries.flatten(1).unique(dim=0)) == 9
    second = sampler.sample()
    assert not torch.equal(first.x, second.x)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample().x, first.x)
    for size, queries, message in (
        (31, 4, r"^size: expected 1 to 30"),
        (9, 10, r"^queries: expected 1 to 9"),
        (9, 0, r"^queries: expected 1 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            RecallSampler(images, size=size, queries=queries, seed=0)


def test_copied_pixels_reach_the_logits(random_images):
    plain, copying = MLPNetworks(4, hidden_dims=(9, 8)), MLPNetworks(4, hidden_dims=(9, 8), copies=True)
    copying.load_state_dict(plain.state_dict() | {"log_copy": torch.tensor(math.log(3.0))})
    entries, z = random_images(5), torch.randn(2, 5, 4)
    expected = plain.decode(z, plain.heads(plain.encode(entries))) + 3 * (2 * entries - 1)
    torch.testing.assert_close(copying.decode(z, copying.heads(copying.encode(entries))), expected)


def test_a_memory_of_a_bank_trains_loads_and_resumes(data, tmp_path):
    arguments = ["--tiny", "--candidates=3", "--refresh-every=2", "--out=a"]
    result = run(*arguments, data=data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    facts = content["training"]["recall"]
    assert facts["peak_gib"] > 0
    assert facts["milliseconds_per_update"] > 0
    assert [row["memory"] for row in content["tests"]] == [6, 6, 9]
    assert "An update encodes 3 entries" in (tmp_path / "a" / "report.md").read_text()
    loaded = run("--tiny", "--load=a/model.pt", "--out=b", data=data, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads((tmp_path / "b" / "results.json").read_text())["tests"] == content["tests"]
    resumed = run(*arguments, "--resume", data=data, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    other = run(
        *arguments[:1], "--candidates=4", "--refresh-every=2", "--out=a", "--resume", data=data, cwd=tmp_path
    )
    assert other.stderr.splitlines()[-1].startswith("error: --resume: expected candidates = 3 as in")
