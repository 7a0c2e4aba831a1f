"""Files say how to make any subclass again; a run is loaded and resumed with its own classes."""

import sys

import processes
import pytest
import torch
from own_parts import Free, Looking, Tempered, Weighted, bound, mlp, own_classes, pairs, refused

import vma_pyro
from vma_pyro import (
    ConvNetworks,
    Guide,
    Model,
    models,
)
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.models.programs import class_name
from vma_pyro.training import TrainConfig, fit


@pytest.mark.parametrize("name", pairs())
def test_a_pair_is_made_again_bit_for_bit(name, tmp_path):
    pair = pairs()[name]()
    with torch.no_grad():
        for parameter in models.as_one(pair).parameters():
            parameter.add_(0.01)
    models.save(tmp_path / "model.pt", pair, data="glyphs")
    again = models.load(tmp_path / "model.pt", classes=own_classes(pair))
    assert [type(program) for program in again] == [type(program) for program in pair]
    assert bound(again) == bound(pair)
    model, guide = again
    assert (model.networks is guide.networks) == (name != "own_networks_each")
    assert len(list(models.as_one(again).parameters())) == len(list(models.as_one(pair).parameters()))
    assert models.program_of(again) == "memory"


def test_arguments_come_back_as_they_were(tmp_path):
    pair = pairs()["own_guide"]()
    models.save(tmp_path / "model.pt", pair)
    _, guide = models.load(tmp_path / "model.pt", classes=(Looking, Weighted))
    assert (guide.sharpness, guide.more) == (0.5, (6, "seven"))
    assert guide.similarity.names == {"first": [1, None], 2: (True, "two")}
    assert guide.similarity.norm == pair[1].similarity.norm


def test_comparisons_keep_their_names(untrained):
    for program in models.PROGRAMS:
        pair = models.load(untrained / f"{program}.pt", program=program)
        assert models.program_of(pair) == program
        facts = models.facts_of(untrained / f"{program}.pt")
        known = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": program, "data": "omniglot"}
        assert facts | known == facts
    with pytest.raises(ValueError, match="expected a soft or soft-guided model, got one of memory$"):
        models.load(untrained / "memory.pt", program=("soft", "soft-guided"))


@pytest.mark.parametrize("name", ["ConvNetworks", "Model", "RetrievalGuide", "LearnedAddress"])
def test_a_file_says_the_same_whatever_was_asked_for_before(monkeypatch, name):
    kind = getattr(vma_pyro, name)
    assert class_name(kind) == f"vma_pyro:{name}"
    monkeypatch.delitem(vars(vma_pyro), name)  # as in a process that has not asked for it
    assert class_name(kind) == f"vma_pyro:{name}"


def test_facts_of_ones_own_classes(tmp_path):
    pair = pairs()["tempered"]()
    models.save(tmp_path / "model.pt", pair, training={"updates": 5})
    facts = models.facts_of(tmp_path / "model.pt")
    assert facts["networks"] == "mlp"
    assert facts["program"] == models.describe(*pair)["parts"][-2]["class"]
    assert (facts["latent_dim"], facts["updates"]) == (3, 5)


def train(folder, pair, updates=3, **options):
    episodes = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    config = TrainConfig(updates=updates, accelerator="cpu", new_budget="resume" in options)
    elbo = MultiSampleELBO(3, max_plate_nesting=1)
    fit(*pair, elbo, episodes, config=config, folder=folder, show_progress=False, **options)
    return pair


@pytest.mark.parametrize("name", ["tempered", "own_guide"])
def test_a_run_is_loaded_and_resumed(name, tmp_path):
    pair = train(tmp_path, pairs()[name]())
    classes = own_classes(pair)
    assert bound(models.load(tmp_path / "checkpoint.pt", classes=classes)) == bound(pair)
    train(tmp_path, pairs()[name](), updates=4, resume=True)
    whole = train(tmp_path / "whole", pairs()[name](), updates=4)
    assert models.facts_of(tmp_path / "checkpoint.pt")["updates"] == 4
    assert len(list(models.as_one(whole).parameters())) == len(list(models.as_one(pair).parameters()))


def test_a_run_of_what_cannot_be_said_is_trained_and_resumed(tmp_path):
    networks = mlp()
    train(tmp_path, (Model(networks), Guide(networks, similarity=Free())))
    refused(tmp_path / "checkpoint.pt", "expected programs that can be made again")
    networks = mlp()
    pair = train(tmp_path, (Model(networks), Guide(networks, similarity=Free())), updates=4, resume=True)
    models.read_weights(pair, tmp_path / "checkpoint.pt")


def test_other_parts_are_not_resumed(tmp_path):
    train(tmp_path, pairs()["own_guide"]())

    def resumed(sharpness, weights):
        networks = mlp()
        similarity = Weighted(weights, scales=[0.5, 3], names={"first": [1, None], 2: (True, "two")})
        train(tmp_path, (Model(networks), Looking(networks, similarity, sharpness, 6, "seven")), resume=True)

    resumed(0.5, torch.linspace(-1, 1, 5))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"^resume: expected sharpness = 0.5 of .*Looking as in the .*, got 0.7$"):
        resumed(0.7, torch.linspace(-1, 1, 5))
    with pytest.raises(ValueError, match=r"^resume: expected weights = a tensor \[5\] of .*Weighted"):
        resumed(0.5, torch.linspace(-1, 2, 5))
    networks = mlp()
    with pytest.raises(ValueError, match=r"^resume: expected .* as in the checkpoint, got another one"):
        train(tmp_path, (Tempered(networks), Guide(networks)), resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


CODE = """
import pyro.distributions as dist
from vma_pyro import Model
from my_neighbour import FACTOR


class Soft(Model):
    def likelihood(self, logits):
        return dist.Bernoulli(logits=FACTOR * logits).to_event(3)


class Holder:
    class Within(Soft):
        pass
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A user's file with a neighbour, which no module of another test has the name of."""
    (tmp_path / "my_neighbour.py").write_text("FACTOR = 0.5\n")
    (tmp_path / "my_model.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "my_model.py"
    for name in ("my_model", "my_neighbour"):
        sys.modules.pop(name, None)


def test_classes_of_a_file(own_file, tmp_path):
    found = models.classes_in(own_file)
    assert [models.programs.class_name(kind) for kind in found] == ["my_model:Soft", "my_model:Holder.Within"]
    assert models.classes_in(own_file) == found  # run once
    assert models.classes_in("my_model") == found
    assert models.classes_in(None) == ()
    networks = ConvNetworks(4, width=0.1)
    pair = found[1](networks), Guide(networks)
    models.save(tmp_path / "model.pt", pair)
    assert bound(models.load(tmp_path / "model.pt", program="memory", classes=found)) == bound(pair)


def test_a_script_goes_by_its_file(own_file, tmp_path):
    """Its classes are of `__main__` where it trains, and of its file where they are allowed."""
    script = CODE.replace("import Model", "import Guide, MLPNetworks, Model, models") + (
        "if __name__ == '__main__':\n"
        "    networks = MLPNetworks(3)\n"
        "    models.save('model.pt', (Soft(networks), Guide(networks)))\n"
    )
    own_file.write_text(script)
    done = processes.run(own_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = models.classes_in(own_file)
    model, _ = models.load(tmp_path / "model.pt", classes=found)
    assert type(model) is found[0]


@pytest.mark.parametrize(
    ("source", "text", "wanted"),
    [
        ("none.py", None, "^code: expected a Python file, found none at none.py$"),
        (
            "gone_module",
            None,
            r"^code: expected Python code that can be imported, got gone_module \(ModuleNotFound",
        ),
        ("raises.py", "raise RuntimeError('first\\nsecond')", r"got raises.py \(RuntimeError: first\)$"),
        ("wrong.py", "def", r"got wrong.py \(SyntaxError: "),
        ("leaves.py", "import sys; sys.exit(3)", r"got leaves.py \(SystemExit: 3\)$"),
        (
            "empty.py",
            "from vma_pyro import Model",
            "^code: expected subclasses of vma_pyro.Part in empty.py, found none$",
        ),
        ("pyro.py", "", "^code: expected a file of another name, got pyro.py: there is such a module$"),
    ],
)
def test_code_that_is_none(source, text, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        (tmp_path / source).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        models.classes_in(source)
    sys.modules.pop("empty", None)
