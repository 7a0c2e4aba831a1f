"""The page of the discrete autoencoders: from two tiny runs, and its verdicts on made-up curves."""

import json

import pytest
import torch
from scripts import call, module

from discrete_vae import findings, published
from discrete_vae.page import page
from discrete_vae.runs import COLUMNS
from vma_pyro.evaluation import Mean


def made(estimator, seed, ends, *, k=2, model="linear", evaluations=2.0):
    """A run whose training ELBO is so much after 10 updates, then 20, ..."""
    curve = [[10 * (i + 1), e, e, e + 3, e - 1, e + 2, 0.04 * (i + 1)] for i, e in enumerate(ends)]
    scores = {
        part: {what: {"mean": ends[-1]} for what in ("elbo", "bound")} for part in ("train", "validation", "test")
    }
    fixed = ("elbo", True, evaluations, 10 * len(ends), curve, scores)
    return findings.Run("mnist", model, estimator, k, seed, None, *fixed)


def test_the_page_of_two_tiny_runs(data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("--estimator", "rloo", "disarm")
    call(module("binary_vae"), "--tiny", "--updates=4", f"--data-dir={data_folder}", *names, "--out=runs")
    line = {"variance": 2.5e-6, "se": 1e-7, "square": 0.1}
    row = {"update": 3, "estimator": "rloo", "num_particles": 2, "objective": "elbo", "unbiased": True}
    rows = [row | {"evaluations": 2, "guide": line, "model": line}]
    facts = {"data": "mnist", "model": "linear", "trajectory": "disarm", "trajectory_particles": 2}
    variance = facts | {"seed": 0, "draws": 7, "warm_up": 5, "rows": rows}
    (tmp_path / "runs" / "variance-x.json").write_text(json.dumps(variance))
    call(module("binary_vae_page"), "--folder=runs")
    text = (tmp_path / "runs.md").read_text()
    assert "## mnist, linear" in text
    assert "After 4 updates" in text
    run = json.loads((tmp_path / "runs" / "mnist-linear-disarm-2-0.json").read_text())
    assert f"| 2 | disarm, K = 2 | elbo | yes | 1 | {run['curve'][-1][2]:.2f} |" in text
    assert "| rloo, K = 2 | elbo | yes | 2 | 2.5 ± 0.1 |" in text
    assert "nan" not in text
    assert str(tmp_path) not in text
    content = json.loads((tmp_path / "runs.json").read_text())
    assert content["runs"] == ["mnist-linear-disarm-2-0", "mnist-linear-rloo-2-0"]
    assert f"`{content['command']}`" in text


def test_differences_are_seed_by_seed_and_decide():
    runs = [made("disarm", s, [-110.0 - s, -100.0 - 9 * s]) for s in (0, 1)]
    runs += [made("rloo", s, [-112.0 - s, -101.0 - 9 * s - 0.02 * s]) for s in (0, 1)] + [made("arm", 0, [-111.0])]
    (group,) = findings.grouped(runs)
    assert group.lengths() == [10, 20]
    assert [line.first.estimator for line in group.after(10)] == ["disarm", "arm", "rloo"]
    assert [line.first.estimator for line in group.after(20)] == ["disarm", "rloo"]
    disarm, rloo = (group.find((name, 2), 20) for name in ("disarm", "rloo"))
    difference = disarm.minus(rloo, "train_elbo", 20)
    assert difference == pytest.approx((1.01, 0.01, 2))
    assert findings.verdict(difference) == "agreed"
    assert disarm.first.milliseconds == pytest.approx(4.0)
    text = "\n".join(page(runs, []))
    assert "| disarm, K = 2 | rloo, K = 2 | mnist, linear, 20 updates | 1.01 ± 0.01 | agreed |" in text
    assert "| arm, K = 2 | mnist, linear, 10 updates | 1.00 | agreed, one seed |" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.2], "agreed"),
        ([-1.0, -1.2], "not agreed"),
        ([1.0, -0.8], "undecided"),
        ([-1.0], "not agreed, one seed"),
    ],
)
def test_verdicts(values, expected):
    assert findings.verdict(Mean.of(torch.tensor(values))) == expected


def test_published_figures_stand_beside_ours_and_say_what_is_recalled():
    runs = [
        made(name, s, [v - s], model="nonlinear-rodeo")
        for name, v in (("disarm", -99.0), ("double-cv", -101.0))
        for s in (0, 1)
    ]
    runs += [
        made(name, 0, [v], k=1, evaluations=1.0) for name, v in (("nvil", -113.0), ("gumbel-softmax", -110.0))
    ]
    text = "\n".join(page(runs, []))
    assert "theirs written down from memory, ours after 10 updates." in text
    assert "| disarm, K = 2 | -102.75 ± 0.08 | -99.50 ± 0.50 | 2 | 2 | 1 |" in text
    assert "two standard errors of ours: 1 not agreed." in text
    assert "theirs read in the paper's source" in text
    assert "| nvil, K = 1 | -112.5 | -113.00 | 1 | 2 | 2 |" in text
    assert "two standard errors of ours: 1 agreed." in text


def test_published_tables_are_whole():
    recalled = {t.title.split(" (")[1].split(")")[0]: t.recalled for t in published.TABLES}
    assert recalled == {"RODEO": True, "RELAX": False, "ReinMax": True}
    means = [
        sum(t.values[name, 1][0] for t in published.TABLES if "ReinMax" in t.title)
        for name in ("straight-through-plain", "straight-through", "reinmax")
    ]
    # With 16x12, which is not here, they are six times the means that the sheet recalls beside.
    expected = [6 * 116.72 - 113.31, 6 * 105.20 - 100.09, 6 * 103.21 - 98.06]
    assert means == pytest.approx([-mean for mean in expected], abs=0.1)
    assert tuple(COLUMNS[:2]) == ("update", "bound")


def test_refusals(tmp_path):
    with pytest.raises(SystemExit) as end:
        call(module("binary_vae_page"), f"--folder={tmp_path}")
    assert str(end.value) == f"error: --folder: expected files of runs, found none in {tmp_path.name}"
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        call(module("binary_vae_page"), f"--folder={tmp_path}")
    assert str(end.value) == "error: --folder: expected files of runs and variances, got a.json"
