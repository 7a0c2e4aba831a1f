"""What would fail after training fails before it, in one line; what is no more than a picture fails nothing."""

import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scripts import call, module

from common import images, plots, results
from main_job import footprint, rehearsal
from vma_pyro import Model, models
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import make

CPU = torch.device("cpu")
TINY = ["--tiny", "--no-memoryless", "--accelerator=cpu"]
EPISODES = EpisodeSampler(glyphs.load(classes=12), classes=8, shots=2, queries=16, seed=0)


def pair():
    return models.build({"networks": "conv", "width": 0.1, "latent_dim": 4, "program": "memory"})


def peak_of(k, queries, estimator):
    """Bytes of an update, from the tensors alive during it: forward and backward pass."""
    e = EpisodeSampler(glyphs.load(classes=12), classes=8, shots=2, queries=queries, seed=0).sample()
    loss_fn = make(estimator, k)(*pair())
    with footprint.Storages() as storages:
        loss_fn(e.memory, e.x).backward()
    return storages.peak


@pytest.mark.parametrize("estimator", ["vimco", "rloo", "vimco+resampled"])
def test_the_estimate_of_a_large_update_from_small_ones(estimator):
    few = EpisodeSampler(glyphs.load(classes=12), classes=8, shots=2, queries=4, seed=0).sample()
    model, guide = pair()

    def first(n):
        return few._replace(x=few.x[:n], labels=few.labels[:n])

    options = {"particles": 20, "queries": 24, "device": CPU}
    found = footprint.bytes_of_update(model, guide, lambda k: make(estimator, k), first, **options)
    measured = peak_of(20, 24, estimator)
    assert measured < found < 3 * measured


def test_what_does_not_fit_is_refused_by_the_name_of_the_larger(monkeypatch):
    monkeypatch.setattr(rehearsal, "available", lambda device: 20e6)
    few = EPISODES.sample()
    for sizes, name in (
        ({"particles": 500, "queries": 16}, "particles"),
        ({"particles": 8, "queries": 900}, "queries"),
    ):
        line = rf"^{name}: expected an update that fits into the 0.0 GB there are, got .* lower {name} to \d+"
        with pytest.raises(ValueError, match=line):
            rehearsal.check_update_fits(pair(), lambda k: make("vimco", k), few, **sizes, device=CPU)
    rehearsal.check_update_fits(pair(), lambda k: make("vimco", k), few, particles=2, queries=2, device=CPU)


@pytest.mark.parametrize("name", ["width", "latent_dim", "refinement"])
def test_networks_that_do_not_fit_are_never_made(name):
    architecture = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": "memory", "refinement": 2}
    rehearsal.check_weights_fit(architecture, CPU)
    with pytest.raises(ValueError, match=f"^{name}: expected networks whose weights and their gradients fit into"):
        rehearsal.check_weights_fit({**architecture, name: 10**7}, CPU)


def test_the_limit_of_a_group_counts(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    for file, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "inactive_file 50\nx 1"),
    ):
        (group / file).write_text(text)
    left = footprint._left(*(group / file for file in ("memory.max", "memory.current", "memory.stat")))
    assert left == 350
    (group / "memory.max").write_text("max\n")
    assert footprint._left(*(group / f for f in ("memory.max", "memory.current", "memory.stat"))) == math.inf
    assert 0 < footprint.available(CPU) < math.inf


class NoMean(torch.distributions.Independent):
    """A likelihood that can be scored and drawn from, and has no mean."""

    @property
    def mean(self):
        raise NotImplementedError


def edited(monkeypatch, likelihood):
    monkeypatch.setattr(Model, "likelihood", likelihood)


def run(monkeypatch, tmp_path, *options):
    monkeypatch.chdir(tmp_path)
    call(module("few_shot"), *TINY, *options)


def test_a_likelihood_without_a_mean_has_figures_and_no_picture(monkeypatch, tmp_path, capsys):
    def likelihood(self, logits):
        found = dist.Bernoulli(logits=logits).to_event(3)
        found.__class__ = type("NoMean", (type(found),), {"mean": NoMean.mean})
        return found

    edited(monkeypatch, likelihood)
    run(monkeypatch, tmp_path)
    told = capsys.readouterr().out
    assert "warning: samples.png is not drawn (NotImplementedError)" in told
    folder = tmp_path / "runs" / "few_shot"
    assert json.loads((folder / "results.json").read_text())["nll"]["1"]["n"] == 4
    report = (folder / "report.md").read_text()
    assert "samples.png is not drawn (NotImplementedError)." in report
    assert "`posterior.png` (the address posterior)" in report
    assert not (folder / "samples.png").exists()
    assert (folder / "posterior.png").exists()


@pytest.mark.parametrize(
    ("likelihood", "line"),
    [
        (
            lambda self, logits: dist.Bernoulli(logits=logits.nothing),
            "rehearsal: expected the job to run on two images, got AttributeError .*'Tensor' object has no attr",
        ),
        (
            lambda self, logits: dist.Bernoulli(logits=logits @ torch.ones(5)).to_event(3),
            "rehearsal: expected the job to run on two images, got RuntimeError ",
        ),
        (
            lambda self, logits: dist.Bernoulli(logits=logits[..., :5]).to_event(3),
            r"site 'x': expected a distribution of images \[1, 28, 28\], got one of \[1, 28, 5\]; see `chan",
        ),
    ],
)
def test_a_mistake_in_the_model_costs_no_training(likelihood, line, monkeypatch, tmp_path):
    edited(monkeypatch, likelihood)
    with pytest.raises(SystemExit, match=f"^error: {line}") as caught:
        run(monkeypatch, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_likelihood_that_is_nan_costs_no_training(monkeypatch, tmp_path):
    edited(
        monkeypatch,
        lambda self, logits: dist.Normal(logits, logits * 0 + math.nan, validate_args=False).to_event(3),
    )
    with pytest.raises(SystemExit, match="^error: site 'x': expected parameters of Normal, got NaN in scale"):
        run(monkeypatch, tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("no font"), MemoryError()])
def test_no_picture_costs_a_report(fault, monkeypatch, tmp_path, capsys):
    def fails(path):
        assert (tmp_path / "results.json").exists()  # the figures are there first
        raise fault

    content = {"command": "c", "training": {}}
    good = results.Picture(
        "good.png", "good", lambda path: plots.save_lines(path, {"a": [(1, 2, None)]}, x="x", y="y")
    )
    results.write(tmp_path, content, "Title", ["Text.", results.Picture("bad.png", "bad", fails), good])
    page = (tmp_path / "report.md").read_text()
    assert f"bad.png is not drawn ({type(fault).__name__}" in page
    assert "![good](good.png)" in page
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("warning: bad.png is not drawn")


def test_earlier_trainings_are_one_clause_of_a_report(tmp_path):
    """All of them in full are forty lines; options that were left open are none."""
    cycles = [{"updates": 10, "command": "a"}, {"updates": 5}]
    training = {"memory": {"updates": 7, "copies": None, "cycles": cycles, "command": "b"}}
    results.write(tmp_path, {"command": "c", "training": training}, "Title", ["Text."])
    page = (tmp_path / "report.md").read_text()
    assert "memory: updates 7, command b, before that 2 trainings of 15 updates in all" in page.replace("\n", " ")
    assert json.loads((tmp_path / "results.json").read_text())["training"]["memory"]["cycles"] == cycles


def test_a_picture_is_there_as_a_whole_or_not_at_all(monkeypatch, tmp_path):
    entries = np.zeros((1, 28, 28))
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    reason = plots.drawn(
        tmp_path / "a.png", lambda path: images.save_samples(path, entries, [entries[:, None]], title="")
    )
    assert reason == "OSError: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []
