"""The size of the test memory with tiny arguments: every size, the excess over L_1 + log C, other models."""

import math
import shutil

import pytest
from scripts import is_estimate, refusal, results


def test_every_size(data_folder, untrained, tmp_path):
    again = tmp_path / "again" / "model.pt"
    again.parent.mkdir()
    shutil.copyfile(untrained / "memory.pt", again)
    content = results(
        "memory_size",
        "--tiny",
        *(f"--{option}={untrained / name}.pt" for option, name in (("load", "memory"), ("soft", "soft"))),
        f"--memoryless={untrained / 'memoryless.pt'}",
        f"--also={again}",
        f"--data-dir={data_folder}",
        cwd=tmp_path,
        out="a",
    )
    rows = {(r["model"], r["test"], r["classes"], r["shots"]): r for r in content["rows"]}
    assert len(rows) == len(content["rows"]) == 4 + 2 + 2 + 4 + 1
    assert all(is_estimate(r["nll"], n=4, low=100) for r in rows.values())
    one, two = (rows["hard", "five alphabets", c, 1] for c in (1, 2))
    assert one["excess"]["mean"] == 0
    assert rows["again", "five alphabets", 1, 2]["nll"] == rows["hard", "five alphabets", 1, 2]["nll"]
    expected = two["nll"]["mean"] - one["nll"]["mean"] - math.log(2)
    assert two["excess"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert rows["hard", "all alphabets", 3, 2]["entries"] == 6
    assert "excess" in rows["soft", "five alphabets", 2, 2]


def test_models_of_the_same_name(data_folder, untrained, tmp_path):
    arguments = [f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}", "--tiny"]
    also = ["--also", untrained / "memory.pt", untrained / "soft.pt"]
    line = refusal("memory_size", *arguments, *also, cwd=tmp_path)
    assert line.startswith(
        "error: --also: expected checkpoints in folders of different names, got hard, untrained"
    )
