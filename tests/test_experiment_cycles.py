"""The page of all cycles: runs are taken over by name, once, and what changed stands in their rows."""

import json

import pytest
from scripts import PNG, refusal, run

SHAPE = ("--data=glyphs", "--tiny", "--no-memoryless", "--eval-images=2", "--eval-samples=1", "--eval-queries=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cycles")
    for name, more in (
        ("one", ()),
        ("two", ("--init=one/model.pt", "--blocks=1")),
        ("c", ("--likelihood=causal",)),
    ):
        done = run("few_shot", *SHAPE, *more, f"--out={name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_cycles_are_taken_over_by_name(runs):
    for more in (("--add", "one", "c", "--note=from scratch"), ("--add", "two"), ("--add", "two"), ()):
        done = run("cycles", "--out=results/models", *more, cwd=runs)
        assert done.returncode == 0, done.stderr
    cycles = json.loads((runs / "results" / "models.json").read_text())["cycles"]
    assert [cycle["name"] for cycle in cycles] == ["one", "c", "two"]
    assert [cycle["note"] for cycle in cycles] == ["from scratch", "from scratch", ""]
    assert [cycle["options"].get("blocks") for cycle in cycles] == [None, None, 1]
    assert all(cycle["finished"] and cycle["updates"] == 2 for cycle in cycles)
    page = (runs / "results" / "models.md").read_text()
    assert page.count("## Likelihood: ") == 2
    assert "| two | one | width 0.1, blocks 1, " in page
    for kind in ("bernoulli", "causal"):
        assert (runs / "results" / f"models_{kind}.png").read_bytes().startswith(PNG)


def test_what_is_no_run_is_refused(tmp_path):
    assert refusal("cycles", "--out=results/models", cwd=tmp_path).startswith(
        "error: --add: expected folders of runs"
    )
    line = refusal("cycles", "--out=results/models", "--add=nothing", cwd=tmp_path)
    assert line.startswith("error: checkpoint: expected a file, found none at nothing")
