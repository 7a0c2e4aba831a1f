"""Publishing a model: weights that give the same figures, a card, and no step back."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from scripts import refusal, run

import publish_model
from vma_pyro import models
from vma_pyro.pretrained import path_of


def test_publishes_once_and_then_only_what_is_better(data_folder, untrained, tmp_path):
    arguments = ["--tiny", f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}", "--out=models"]
    done = run("publish_model", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "models" / "omniglot.json").read_text())
    assert json.loads(done.stdout) == card
    assert card["training"]["data"] == "omniglot"
    assert set(card["accuracy"]) == {"5-way 1-shot", "5-way 5-shot"}  # there are 18 test classes
    assert card["nll"]["1"]["n"] == 5
    ours, theirs = (
        models.as_one(models.load(path)).state_dict()
        for path in (tmp_path / "models" / "omniglot.pt", untrained / "memory.pt")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in ours)
    assert abs(card["rounding"]["mean"]) < 0.05
    found = card["validation_guide_gap"]
    assert found["gap"]["n"] == 2
    assert found["gap"]["mean"] == pytest.approx(found["refined_elbo"]["mean"] - found["elbo"]["mean"])
    file = tmp_path / "models" / "omniglot.pt"
    parameters = sum(p.numel() for p in models.as_one(models.load(file)).parameters())
    assert 2 * parameters < file.stat().st_size < 2.5 * parameters + 100_000

    line = refusal("publish_model", *arguments, cwd=tmp_path)
    assert line.startswith("error: --load: expected a lower validation NLL than ")
    worse = card | {"validation_nll": card["validation_nll"] | {"mean": 1e6}}
    (tmp_path / "models" / "omniglot.json").write_text(json.dumps(worse))
    assert run("publish_model", *arguments, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "models" / "omniglot.json").read_text())["nll"] == card["nll"]


def test_a_judge_lets_the_samples_choose(data_folder, untrained, tmp_path):
    """By their class, and not by the NLL: the same model is not better than itself."""
    arguments = ["--tiny", f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}", "--out=models"]
    judged = [*arguments, f"--judge={untrained / 'memory.pt'}"]
    assert run("publish_model", *judged, cwd=tmp_path).returncode == 0
    card = json.loads((tmp_path / "models" / "omniglot.json").read_text())
    for found in (card["validation_fidelity"], card["fidelity"]):
        assert set(found) == {"generated", "real"}
        assert found["generated"]["n"] == 5
    line = refusal("publish_model", *judged, cwd=tmp_path)
    assert line.startswith("error: --load: expected a higher class fidelity than ")


@pytest.mark.parametrize(
    ("share", "nll", "published"),
    [(0.71, 60.0, True), (0.70, 54.0, True), (0.69, 54.0, True), (0.70, 55.0, False), (0.67, 54.0, False)],
)
def test_a_judge_lets_the_nll_choose_within_the_error(tmp_path, monkeypatch, share, nll, published):
    """Beside a published model of 70 ± 2 % and 55 nats."""
    (tmp_path / "omniglot.json").write_text(json.dumps({"validation_nll": {"mean": 55.0}}))
    monkeypatch.setattr(publish_model.models, "load", lambda *args, **options: (torch.nn.Identity(),) * 2)
    monkeypatch.setattr(publish_model, "fidelity", lambda *args: {"generated": {"mean": 0.70, "se": 0.02}})
    config = publish_model.PublishConfig(load=tmp_path, out=tmp_path, judge=tmp_path)
    found = {"nll": {"mean": nll}, "fidelity": {"generated": {"mean": share}}}
    check = functools.partial(publish_model.check_better, (), found, config, SimpleNamespace(validation=None))
    if published:
        check(torch.device("cpu"))
    else:
        with pytest.raises(ValueError, match=r"^load: expected a higher class fidelity than 70.0 ± 2.0 % of .*"):
            check(torch.device("cpu"))


def test_an_unknown_name_is_one_line():
    with pytest.raises(ValueError, match="^name: expected one of .*, got 'imagenet'$"):
        path_of("imagenet")
