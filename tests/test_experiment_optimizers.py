"""Optimizers at equal seconds with tiny arguments: the same images for each, differences paired by image."""

import pytest
from scripts import is_estimate, refusal, results


def test_two_optimizers(data_folder, tmp_path):
    content = results(
        "optimizers",
        "--tiny",
        f"--data-dir={data_folder}",
        "--optimizers",
        "adam",
        "muon:0.01",
        cwd=tmp_path,
        out="a",
    )
    adam, muon = content["rows"]
    assert (adam["optimizer"], muon["optimizer"]) == ("adam", "muon:0.01")
    for row in content["rows"]:
        assert row["updates"] == max(1, round(60 * row["minutes"] / content["seconds"][row["optimizer"]]))
        assert [cell["shots"] for cell in row["nll"]] == [1, 2]
        assert all(is_estimate(cell["nll"], n=4, low=100) for cell in row["nll"])
        assert is_estimate(row["accuracy"][0], n=4, high=1)
    for one, other in zip(adam["nll"], muon["nll"], strict=True):
        assert one["more"]["mean"] == 0
        assert other["more"]["mean"] == pytest.approx(other["nll"]["mean"] - one["nll"]["mean"], abs=1e-3)
        assert other["more"]["mean"] != 0  # another model, of the same initial weights
    again = results("optimizers", "--tiny", f"--data-dir={data_folder}", "--optimizers", "adam", "muon:0.01",
                    "--resume", cwd=tmp_path, out="a")  # fmt: skip
    assert again["rows"] == content["rows"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sgd", "error: --optimizers: optimizer: expected one of muon, adam, soap, got 'sgd'"),
        ("adam:-1", "error: --optimizers: learning_rate: expected more than 0, got -1.0"),
        ("adam:fast", "error: --optimizers: could not convert string to float: 'fast'"),
    ],
)
def test_one_line_for_what_is_no_optimizer(name, line, tmp_path):
    assert refusal("optimizers", "--tiny", "--optimizers", name, cwd=tmp_path) == line


def test_two_precisions_at_equal_updates(data_folder, tmp_path):
    options = ["--updates", "3", "--seeds", "0", "--optimizers", "adam@32-true", "adam@bf16-mixed"]
    content = results("optimizers", "--tiny", f"--data-dir={data_folder}", *options, cwd=tmp_path, out="a")
    assert [row["updates"] for row in content["rows"]] == [3, 3]
    assert [facts["precision"] for facts in content["training"].values()] == ["32-true", "bf16-mixed"]
    assert content["seconds"] == {}
    assert content["rows"][1]["nll"][0]["more"]["mean"] != 0
