"""Hard against soft attention with tiny arguments: four models, paired gaps."""

import pytest
from scripts import is_estimate, results


def test_four_models(data_folder, tmp_path):
    content = results("soft_attention", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    rows = {(r["model"], r["classes"], r["shots"]): r for r in content["nll"]}
    assert {model for model, *_ in rows} == {"hard", "soft", "soft, target-guided", "no memory"}
    assert len(rows) == 3 * 2 + 1
    for (_, classes, shots), row in rows.items():
        assert is_estimate(row["nll"], n=4, low=100)
        gap = row["nll"]["mean"] - rows["hard", classes, shots]["nll"]["mean"]
        assert row["more_than_hard"]["mean"] == pytest.approx(gap, abs=1e-3)
    assert all(is_estimate(r["accuracy"], n=4, high=1) for r in content["accuracy"])
    assert len({facts["updates"] for facts in content["training"].values()}) == 1
