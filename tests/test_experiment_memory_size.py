"""The size of the test memory with tiny arguments: every size, the excess over L_1 + log C, other models."""

import math

import pytest
from scripts import is_estimate, results


def test_every_size(data_folder, untrained, tmp_path):
    content = results(
        "memory_size",
        "--tiny",
        *(f"--{option}={untrained / name}.pt" for option, name in (("load", "memory"), ("soft", "soft"))),
        f"--memoryless={untrained / 'memoryless.pt'}",
        f"--data-dir={data_folder}",
        cwd=tmp_path,
        out="a",
    )
    rows = {(r["model"], r["test"], r["classes"], r["shots"]): r for r in content["rows"]}
    assert len(rows) == len(content["rows"]) == 4 + 2 + 4 + 1
    assert all(is_estimate(r["nll"], n=4, low=100) for r in rows.values())
    one, two = (rows["hard", "five alphabets", c, 1] for c in (1, 2))
    assert one["excess"]["mean"] == 0
    expected = two["nll"]["mean"] - one["nll"]["mean"] - math.log(2)
    assert two["excess"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert rows["hard", "all alphabets", 3, 2]["entries"] == 6
    assert "excess" in rows["soft", "five alphabets", 2, 2]
