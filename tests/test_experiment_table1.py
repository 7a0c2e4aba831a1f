"""Table 1 with tiny arguments: every cell, paired figures, going on after an interruption, one-line errors."""

import json
import shutil

from scripts import is_estimate, refusal, results, run

from vma_pyro._system import checkpoint


def test_every_cell_and_going_on(data_folder, untrained, tmp_path):
    arguments = ["--tiny", f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}"]
    content = results("table1", *arguments, cwd=tmp_path, out="a")
    cells = [(r["counting"], r["classes"], r["shots"], r["address"]) for r in content["rows"]]
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 + 2 + 2
    assert ("shots per class", 2, 1, "exact") in cells
    assert ("shots per class", 2, 1, "refined") in cells
    assert ("images in all", 2, 2, "sampled") in cells
    assert ("images in all, with replacement", 1, 2, "sampled") in cells
    assert all(is_estimate(r["nll"], n=4, low=100) for r in content["rows"])  # an untrained model
    page = (tmp_path / "a" / "report.md").read_text()
    assert "| VMA, C = 1 | 86.5 | 83.0 |" in page
    assert "| GMN, C = 1 (recalled) | 83.3 | 78.9 |" in page

    # A cell that is there is not computed again, and one that is not is.
    part = tmp_path / "a" / "parts" / "shots_per_class-2-2.json"
    marked = json.loads(part.read_text())["content"]
    assert [row["address"] for row in marked["rows"]] == ["sampled", "exact", "refined"]
    for row in marked["rows"]:
        row["nll"] = {"mean": 1.0, "se": 2.0, "n": 3}
    part.write_text(json.dumps(marked))
    (tmp_path / "a" / "parts" / "shots_per_class-1-2.json").unlink()
    again = results("table1", *arguments, "--resume", cwd=tmp_path, out="a")
    for row, cell, before in zip(again["rows"], cells, content["rows"], strict=True):
        assert row == (before if cell[:3] != ("shots per class", 2, 2) else before | {"nll": row["nll"]})
        assert (row["nll"]["mean"] == 1.0) == (cell[:3] == ("shots per class", 2, 2))


def test_going_on_with_another_model_is_refused(data_folder, untrained, tmp_path):
    shutil.copyfile(untrained / "memory.pt", tmp_path / "model.pt")
    arguments = ["--tiny", "--load=model.pt", f"--data-dir={data_folder}"]
    results("table1", *arguments, cwd=tmp_path, out="a")
    content = checkpoint.load(tmp_path / "model.pt")
    del content["program"]  # which other weights would not agree with
    content["weights"] = {name: value + 1 for name, value in content["weights"].items()}
    checkpoint.save(tmp_path / "model.pt", content)
    line = refusal("table1", *arguments, "--out=a", "--resume", cwd=tmp_path)
    assert line.startswith("error: --resume: expected content of model.pt = ")


def test_errors_are_one_line(data_folder, untrained, tmp_path):
    for arguments, message in (
        (["--load=none.pt"], "--load: expected a file, found none at none.pt"),
        ([f"--load={untrained / 'soft.pt'}"], f"checkpoint {untrained / 'soft.pt'}: expected a memory model, got"),
        (
            [f"--load={untrained / 'memory.pt'}", "--images=0", "--out=b"],
            "--images: expected at least 1, got 0",
        ),
    ):
        line = refusal("table1", *arguments, f"--data-dir={data_folder}", cwd=tmp_path)
        assert line.startswith(f"error: {message}")
    assert not (tmp_path / "b").exists()
    refused = run("table1", "--few=0", cwd=tmp_path)
    assert refused.returncode == 2
    assert "few: expected at least 1, got 0" in refused.stderr
