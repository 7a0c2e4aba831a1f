"""Weights belong to a program: another one takes them with a word, or not at all."""

import importlib.util
import json
import sys

import pyro.distributions as dist
import pytest
import torch

from vma_pyro import Guide, MLPNetworks, Model, models
from vma_pyro._system import checkpoint
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.models.provenance import probe
from vma_pyro.models.sources import digest_sources
from vma_pyro.program import ImageModel
from vma_pyro.training import TrainConfig, fit

PROGRAM = '''
import pyro.distributions as dist
from vma_pyro import Model

FACTOR = 1.0


def softened(logits):
    return FACTOR * logits


class Soft(Model):
    """Says something."""

    def likelihood(self, logits):
        return dist.Bernoulli(logits=softened(logits)).to_event(3)
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A user's module with such a source, imported afresh."""
    count = iter(range(100))

    def write(source):
        path = tmp_path / f"version{next(count)}" / "own_model.py"
        path.parent.mkdir()
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("own_model", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_model", module)
        spec.loader.exec_module(module)
        return module.Soft

    return write


def networks():
    torch.manual_seed(0)
    return MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)


def train(folder, kind=Model, updates=3, **options):
    shared = networks()
    model, guide = kind(shared), Guide(shared)
    episodes = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    config = TrainConfig(updates=updates, accelerator="cpu", new_budget="resume" in options)
    elbo = MultiSampleELBO(3, max_plate_nesting=1)
    fit(model, guide, elbo, episodes, config=config, folder=folder, show_progress=False, **options)
    return model, guide


SAME = {
    "comments": PROGRAM.replace("    return FACTOR", "    # why\n\n    return FACTOR"),
    "docstrings": PROGRAM.replace("Says something.", "Says something else."),
    "another class": PROGRAM + "\n\nclass Other:\n    pass\n",
}
CHANGED = {
    "the method": PROGRAM.replace("softened(logits)).to", "2 * softened(logits)).to"),
    "a function that it calls": PROGRAM.replace("FACTOR * logits", "FACTOR * logits + 1"),
    "a value that this uses": PROGRAM.replace("FACTOR = 1.0", "FACTOR = 0.5"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_says_nothing_else_is_resumed(name, written, tmp_path):
    train(tmp_path / "run", written(PROGRAM))
    train(tmp_path / "run", written(SAME[name]), updates=4, resume=True)


@pytest.mark.parametrize("name", CHANGED)
def test_another_program_is_not_resumed_and_names_the_class(name, written, tmp_path):
    train(tmp_path / "run", written(PROGRAM))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for updates in (3, 4):  # also where nothing is left to do: the weights would be scored
        with pytest.raises(
            ValueError, match="^resume: expected own_model.Soft as in the checkpoint, got another one; "
        ):
            train(tmp_path / "run", written(CHANGED[name]), updates=updates, resume=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_another_class_is_not_resumed(tmp_path):
    train(tmp_path / "run")

    class Wide(Model):
        def likelihood(self, logits):
            return dist.Normal(logits, 1.0).to_event(3)

    with pytest.raises(ValueError, match="^resume: expected .*Wide as in the checkpoint, got another one"):
        train(tmp_path / "run", Wide, resume=True)


def test_another_argument_is_seen_by_what_it_gives(tmp_path):
    """No source says the temperature: the log probabilities on the example do."""

    class Tempered(Model):
        temperature = 1.0

        def __init__(self, networks):
            super().__init__(networks)
            self.temperature = Tempered.temperature

        def likelihood(self, logits):
            return dist.Bernoulli(logits=logits / self.temperature).to_event(3)

    train(tmp_path / "run", Tempered)
    Tempered.temperature = 3.0
    with pytest.raises(ValueError, match="whose site 'x' has a log probability of .*; an argument or a weight"):
        train(tmp_path / "run", Tempered, updates=4, resume=True)


def edited(monkeypatch, kind):
    """As if the file that users edit said another likelihood."""
    likelihoods = {
        "normal": lambda self, logits: dist.Normal(logits, 1.0).to_event(3),
        "flipped": lambda self, logits: dist.Bernoulli(logits=-logits).to_event(3),
    }
    monkeypatch.setattr(ImageModel, "likelihood", likelihoods[kind])


@pytest.mark.parametrize("program", ["memory", "memoryless", "soft"])
@pytest.mark.parametrize("kind", ["normal", "flipped"])
def test_trained_weights_are_not_loaded_into_another_likelihood(program, kind, untrained, monkeypatch):
    models.load(str(untrained / f"{program}.pt"))
    edited(monkeypatch, kind)
    with pytest.raises(
        ValueError, match="expected the model that it was trained with, whose site 'x' has a log prob"
    ):
        models.load(untrained / f"{program}.pt")


def test_another_guide_is_named(untrained, monkeypatch):
    monkeypatch.setattr("vma_pyro.similarity.CosineSimilarity.embed", lambda self, keys, centre: keys - centre)
    with pytest.raises(ValueError, match="expected the guide that it was trained with, whose site 'address' has"):
        models.load(untrained / "memory.pt")


def test_a_file_of_before_is_loaded_and_says_what_it_cannot_know(untrained, tmp_path, monkeypatch, capsys):
    content = checkpoint.load(untrained / "memory.pt")
    del content["program"]
    checkpoint.save(tmp_path / "old.pt", content)
    models.load(tmp_path / "old.pt")
    assert capsys.readouterr().err == ""
    edited(monkeypatch, "normal")
    models.load(tmp_path / "old.pt")
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'old.pt'} does not say which likelihood it was trained with; here it is Normal\n"
    )


def test_the_example_is_that_of_the_equations():
    """log q(a = 0) and log p(a = 0) of three entries, and log p(x | z, m) by hand, at z = E q(z | x, m_0)."""
    shared = networks()
    model, guide = Model(shared), Guide(shared)
    found = probe(model, guide)
    images = (torch.arange(5 * 784) * 7919 % 101 < 20).float().reshape(5, 1, 28, 28)
    entries, x = images[:3], images[3:]
    with torch.no_grad():
        keys = shared.encode(entries).key
        logits = guide.similarity(shared.query(x).key, keys)
        m = shared.heads(shared.encode(entries[[0, 0]]))
        z = shared.posterior(shared.query(x), m).mean
        expected = -torch.nn.functional.binary_cross_entropy_with_logits(shared.decode(z, m), x, reduction="sum")
    assert found["model x"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["guide address"] == pytest.approx(logits.log_softmax(-1)[:, 0].sum().item(), abs=1e-4)
    assert found["model address"] == pytest.approx(-2 * torch.tensor(3.0).log().item())
    json.dumps(digest_sources(model, guide))
    assert all(digest for digest in digest_sources(model, guide).values())


def test_classes_without_a_source_go_by_their_names():
    made = {"__name__": "typed_in"}
    exec(PROGRAM, made)
    found = digest_sources(made["Soft"](networks()))
    assert found["typed_in.Soft"] == ""
    assert found["vma_pyro.model.Model"] != ""
