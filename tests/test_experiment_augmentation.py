"""Turned training classes with tiny arguments: the same tests for each model, differences paired by image."""

import pytest
from scripts import is_estimate, refusal, results


def test_two_models(data_folder, tmp_path):
    content = results("augmentation", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    without, turned = content["rows"]
    assert (without["augment"], turned["augment"]) == ("none", "rotations")
    for row in content["rows"]:
        assert [cell["shots"] for cell in row["nll"]] == [1, 2]
        assert all(is_estimate(cell["nll"], n=4, low=100) for cell in row["nll"])
        assert is_estimate(row["accuracy"][0]["accuracy"], n=4, high=1)
    for one, other in zip(without["nll"], turned["nll"], strict=True):
        assert one["more"]["mean"] == 0
        assert other["more"]["mean"] == pytest.approx(other["nll"]["mean"] - one["nll"]["mean"], abs=1e-3)
        assert other["more"]["mean"] != 0  # another model: its training classes were others
    assert [facts["updates"] for facts in content["training"].values()] == [2, 2]
    again = results("augmentation", "--tiny", f"--data-dir={data_folder}", "--load=a", cwd=tmp_path, out="b")
    assert again["rows"] == content["rows"]
    line = refusal("augmentation", "--augment=none", cwd=tmp_path)
    assert line == "error: --augment: expected rotations or rotations+flips, to compare with none, got none"
