"""Every benchmark with tiny arguments, and the checks that they rest on."""

import json
from pathlib import Path

import processes
import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"
HELPERS = {
    *(
        "contenders",
        "figures",
        "index_page",
        "machine",
        "one_command",
        "reference",
        "step_page",
        "stretched",
        "update",
    )
}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)


def run(script, *arguments, cwd):
    return processes.run(FOLDER / f"{script}.py", *arguments, cwd=cwd)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tiny(script, tmp_path):
    result = run(script, "--tiny", "--output", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / f"{script}.json").read_text())
    command = f"uv run experiments/benchmarks/{script}.py --tiny --output out"
    assert content["command"] == command
    assert content["machine"]["threads"] == 1
    page = (tmp_path / "out" / f"{script}.md").read_text()
    assert f"`{command}`" in page
    for line in page.splitlines():
        if line.startswith("!["):
            picture = line.split("(")[1].rstrip(")")
            assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    if script == "step":
        (row,) = content["configurations"]
        assert len(row["ratios"]) == 6
        assert all(ratio["n"] == 3 * 2 for ratio in row["ratios"].values())
        assert 0 <= max(row["difference"].values()) < 5e-5
        ours, own = (row["speedup"][f"ours, float32{more}"]["counted"] for more in ("", ", a memory per query"))
        assert ours > own > 1
    if script == "estimators":
        assert {row["estimator"] for row in content["rows"]} == {"vimco", "rloo", "distinct", "measure-valued"}
    if script == "binary_step":
        assert [row["estimator"] for row in content["rows"]] == ["rloo", "disarm"]
        assert all(0 <= row["difference"] < 5e-5 for row in content["rows"])
    if script == "waiting":
        assert set(content["runs"]) == {"help", "pretrained", "main job", "tests"}
        assert 0 < content["runs"]["help"]["peak_gib"] < 0.1  # and not that of this process
    if script == "evaluation":
        assert content["difference_nats"] < 1e-3


def test_named_estimators_take_turns_and_others_are_refused(tmp_path):
    done = run("estimators", "--tiny", "--output=out", "--estimators", "rodeo", "exact", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "estimators.json").read_text())
    assert {row["estimator"] for row in content["rows"]} == {"vimco", "rodeo", "exact"}
    done = run("estimators", "--tiny", "--output=out", "--estimators", "arm", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --estimators: expected names among reinforce, nvil, ")
    assert line.endswith("got 'arm'")


def test_one_line_where_there_is_no_gpu(tmp_path):
    result = run("step", "--tiny", "--accelerator", "cuda", cwd=tmp_path)
    if result.returncode == 0:
        pytest.skip("there is a GPU")
    assert result.stderr.strip().splitlines() == ["error: --accelerator: expected a GPU for cuda, found none"]


def test_no_figure_has_changed(tmp_path):
    """Losses, gradients and bounds of fixed seeds are those of the revision before anything was made faster."""
    changed = json.loads((FOLDER.parent / "results" / "benchmarks" / "bounds_34edf9b.json").read_text())
    changed["figures"]["vimco: gradient"] *= 1.001  # but for this one, which is found
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    result = run("bounds", "--updates", "1", "--against", "changed.json", "--output", "out", cwd=tmp_path)
    assert result.stderr.splitlines()[-1].startswith("error: --against: expected 'vimco: gradient' to be")

    page = (tmp_path / "out" / "bounds.md").read_text()
    table = page.split("|---|---|---|---|\n")[1].splitlines()
    differences = {name.strip(): float(last) for _, name, _, _, last, _ in (line.split("|") for line in table)}
    assert differences.pop("vimco: gradient") > 5e-4
    assert len(differences) > 60
    assert max(differences.values()) < 1e-4
