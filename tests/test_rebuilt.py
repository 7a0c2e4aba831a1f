"""Files say how to make any subclass again, and nothing of what a stranger's file says is done unasked."""

import re
import sys

import processes
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro import (
    ConvNetworks,
    CosineSimilarity,
    Guide,
    LearnedAddress,
    Memory,
    MLPNetworks,
    Model,
    Part,
    models,
)
from vma_pyro._system import checkpoint
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training import TrainConfig, fit


class Tempered(Model):
    """Another likelihood, with an argument of its own."""

    def __init__(self, networks, *, temperature=2.0, **options):
        super().__init__(networks, **options)
        self.temperature = temperature

    def likelihood(self, logits):
        return dist.Bernoulli(logits=logits / self.temperature).to_event(3)


class Weighted(Part):
    """A similarity with a tensor among its arguments, which training changes in place."""

    def __init__(self, weights, scales=(1.0, 2.0), *, names=None):
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.scale, self.names = sum(scales), names
        self.norm = weights.norm().item()  # of what was given, not of what it becomes

    def forward(self, query, keys):
        return self.scale / self.norm * (query * self.weights) @ keys.mT

    def embed(self, keys, centre):
        return keys


class Looking(Guide):
    """A guide that keeps its similarity's answer in reach of a number of its own."""

    def __init__(self, networks, similarity, sharpness: float, *more):
        super().__init__(networks, similarity=similarity)
        self.sharpness, self.more = sharpness, more


class Outer:
    class Inner(Tempered):
        pass


class WithNetworks(Guide):
    """A guide with the model among its arguments."""

    def __init__(self, model):
        super().__init__(model.networks)
        self.model = model


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)


def weighted():
    return Weighted(torch.linspace(-1, 1, 5), scales=[0.5, 3], names={"first": [1, None], 2: (True, "two")})


def pairs():
    def tempered():
        networks = mlp()
        return Tempered(networks, temperature=0.7), Guide(networks)

    def own_guide():
        networks = mlp()
        return Model(networks), Looking(networks, weighted(), 0.5, 6, "seven")

    def own_networks_each():
        return Model(mlp(1)), Guide(mlp(2))

    def learned_prior():
        networks = mlp()
        return Model(networks, address_prior=LearnedAddress(networks, hidden_dim=6)), Guide(networks)

    def nested():
        networks = mlp()
        return Outer.Inner(networks, temperature=3.0), Guide(networks, similarity=CosineSimilarity(scale=2.0))

    def local():
        class Local(Tempered):
            pass

        networks = mlp()
        return Local(networks, temperature=0.3), Guide(networks)

    def of_the_model():
        model = Tempered(mlp())
        return model, WithNetworks(model)

    return {
        f.__name__: f for f in (tempered, own_guide, own_networks_each, learned_prior, nested, local, of_the_model)
    }


def own_classes(pair):
    """The classes of this file among the parts of a pair."""
    modules = {type(part) for program in pair for part in program.modules()}
    return [kind for kind in modules if kind.__module__ == __name__]


def bound(pair):
    torch.manual_seed(5)
    images = (torch.rand(9, 1, 28, 28) < 0.2).float()
    return MultiSampleELBO(3, max_plate_nesting=1)(*pair)(Memory(images[:5]), images[5:])


@pytest.fixture(autouse=True)
def parameters_in_modules():
    with pyro.settings.context(module_local_params=True):
        yield


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


def test_facts_of_ones_own_classes(tmp_path):
    pair = pairs()["tempered"]()
    models.save(tmp_path / "model.pt", pair, training={"updates": 5})
    facts = models.facts_of(tmp_path / "model.pt")
    assert facts["networks"] == "mlp"
    assert facts["program"] == models.describe(*pair)["parts"][-2]["class"]
    assert (facts["latent_dim"], facts["updates"]) == (3, 5)


def refused(path, *wanted, **options):
    """The one line of a refusal, which holds all of these."""
    with pytest.raises(ValueError, match=f"^checkpoint {re.escape(str(path))}: ") as caught:
        models.load(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    for text in wanted:
        assert text in line
    return line


def test_classes_that_are_not_allowed_are_named(tmp_path):
    pair = pairs()["tempered"]()
    models.save(tmp_path / "model.pt", pair)
    name = f"{__name__}:Tempered"
    refused(tmp_path / "model.pt", "expected classes of vma_pyro, got", name, "classes=(Tempered,)", "--code")
    refused(tmp_path / "model.pt", "expected classes of vma_pyro or", name, classes=(Looking,))
    other = type("Tempered", (Tempered,), {"__module__": "elsewhere", "__qualname__": "Tempered"})
    refused(tmp_path / "model.pt", "expected classes of vma_pyro or elsewhere:Tempered", classes=(other,))
    for classes, line in (
        ((nn.Linear,), "classes: expected subclasses of vma_pyro.Part, got <class 'torch.nn"),
        (
            (Tempered, type("Tempered", (Tempered,), {"__module__": __name__, "__qualname__": "Tempered"})),
            "got two",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            models.load(tmp_path / "model.pt", classes=classes)


def test_other_arguments_are_refused(tmp_path):
    models.save(tmp_path / "model.pt", pairs()["tempered"]())

    def narrow(self, networks):
        Model.__init__(self, networks)
        self.temperature = 2.0

    def strict(self, networks, *, temperature, options=None):
        raise RuntimeError("out of\npatience")

    for init, wanted in (
        (narrow, "takes (networks), got options, temperature"),
        (strict, "got others (out of patience)"),
    ):
        other = type(
            "Tempered", (Tempered,), {"__init__": init, "__module__": __name__, "__qualname__": "Tempered"}
        )
        refused(tmp_path / "model.pt", wanted, classes=(other,))


@pytest.fixture
def written(tmp_path):
    """A file whose description is changed by hand."""
    models.save(tmp_path / "whole.pt", pairs()["learned_prior"]())

    def write(change):
        content = checkpoint.load(tmp_path / "whole.pt")
        change(content)
        checkpoint.save(tmp_path / "changed.pt", content)
        return tmp_path / "changed.pt"

    return write


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("os:system", "expected classes of vma_pyro, got 'os:system'"),
        ("builtins:eval", "expected classes of vma_pyro"),
        ("torch.nn:Linear", "expected classes of vma_pyro"),
        ("vma_pyro_evil:Model", "expected classes of vma_pyro"),
        ("vma_pyro.cli:run", "expected a subclass of vma_pyro.Part, got 'vma_pyro.cli:run'"),
        ("vma_pyro.models.files:nn.Linear", "expected a subclass of vma_pyro.Part"),
        ("vma_pyro.models:save", "expected a subclass of vma_pyro.Part"),
        ("vma_pyro.model:Model.__init__.__globals__", "expected a subclass of vma_pyro.Part"),
        ("vma_pyro.model:Gone", "which it does not have"),
        ("vma_pyro.gone:Model", "which it does not have"),
        ("vma_pyro..model:Model", "which it does not have"),
        ("vma_pyro", "which it does not have"),
        ("", "expected classes of vma_pyro"),
        ("x" * 10_000, "expected classes of vma_pyro"),
        (7, "parts: expected a class and its arguments, got"),
    ],
)
def test_nothing_else_is_called(name, wanted, written):
    def change(content):
        content["parts"][0]["class"] = name

    refused(written(change), wanted)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ({"part": 0}, "expected the number of one of the 0 parts before, got 0"),  # itself
        ({"part": 2}, "expected the number of one of the 0 parts before, got 2"),
        ({"part": -1}, "got -1"),
        ({"part": True}, "got True"),
        ({"part": [0]}, "got [0]"),
        ({"part": 0, "dict": []}, "expected plain values, tensors and parts"),
        ({"dict": {}}, "expected plain values, tensors and parts"),
        ({"dict": [[[1], 2]]}, "expected plain values, tensors and parts"),
        ({"dict": [[1]]}, "expected plain values, tensors and parts"),
        (b"bytes", "expected plain values, tensors and parts"),
        (nn.Parameter(torch.zeros(2)), "expected plain values, tensors and parts"),
        (deep(100), "nested at most 20 deep"),
        ("five", "expected arguments that vma_pyro:MLPNetworks takes, got others ("),
    ],
)
def test_malformed_arguments_are_refused(argument, wanted, written):
    def change(content):
        content["parts"][0]["arguments"]["latent_dim"] = argument

    refused(written(change), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(parts={}),
        lambda content: content.update(parts="two\nlines, " + 10_000 * "long"),
        lambda content: content.update(parts=["vma_pyro.model:Model"]),
        lambda content: content.update(pair=[0]),
        lambda content: content.update(pair=7),
        lambda content: content.update(pair=[0, 9]),
        lambda content: content.pop("pair"),
        lambda content: content["parts"][0].pop("arguments"),
        lambda content: content["parts"][0].update(arguments=[1]),
        lambda content: content["parts"][0].update(more=1),
        lambda content: content["parts"][0]["arguments"].update({3: 4}),
    ],
)
def test_malformed_descriptions_are_refused(change, written):
    path = written(change)
    refused(path)
    models.facts_of(path)  # says what it can


def test_a_pair_of_other_parts_is_refused_by_its_weights(written):
    path = written(lambda content: content.update(pair=[0, 1]))
    with pytest.raises(ValueError, match="expected the architecture of model and guide for"):
        models.load(path)


@pytest.mark.parametrize(
    "change", [{"model.networks.to_key.bias": 5}, {"model.": torch.zeros(1)}, {("model",): 3}]
)
def test_malformed_weights_are_refused_or_left_alone(change, written):
    path = written(lambda content: content["weights"].update(change))
    if isinstance(next(iter(change)), tuple):
        models.load(path)
        return
    with pytest.raises(ValueError, match="^checkpoint: expected the architecture of model and guide for .*, got"):
        models.load(path)


class Free(nn.Module):
    """A similarity that says nothing of its arguments."""

    def forward(self, query, keys):
        return query @ keys.mT


class Transformed(Model):
    def __init__(self, networks, transform):
        super().__init__(networks)
        self.transform = transform

    def likelihood(self, logits):
        return dist.Bernoulli(logits=self.transform(logits)).to_event(3)


class Whole(int):
    """No plain number: a file that names this class would not be read."""


def cannot_be_said():
    networks = mlp()
    turned = []
    turned.append(turned)
    return {
        "transform of .*Transformed is a builtins:function": (
            Transformed(networks, lambda logits: 2 * logits),
            Guide(networks),
        ),
        "similarity of vma_pyro:Guide is a .*Free, which is no sub": (
            Model(networks),
            Guide(networks, similarity=Free()),
        ),
        "temperature of .*Tempered is a .*Whole, which is no plain": (
            Tempered(networks, temperature=Whole(3)),
            Guide(networks),
        ),
        "weights of .*Weighted is a torch.nn.parameter:Parameter": (
            Model(networks),
            Guide(networks, similarity=Weighted(nn.Parameter(torch.ones(5)))),
        ),
        "names of .*Weighted has a key that is a builtins:tuple": (
            Model(networks),
            Guide(networks, similarity=Weighted(torch.ones(5), names={(1, 2): 3})),
        ),
        "names of .*Weighted is nested more than 20 deep": (
            Model(networks),
            Guide(networks, similarity=Weighted(torch.ones(5), names=turned)),
        ),
    }


@pytest.mark.parametrize("reason", cannot_be_said())
def test_what_cannot_be_said_is_saved_with_the_reason(reason, tmp_path):
    pair = cannot_be_said()[reason]
    models.save(tmp_path / "model.pt", pair, data="glyphs")
    line = refused(tmp_path / "model.pt", "expected programs that can be made again, got ones of which")
    assert re.search(reason, line)
    expected = bound(pair)
    with torch.no_grad():
        for parameter in models.as_one(pair).parameters():
            parameter.zero_()
    models.read_weights(pair, tmp_path / "model.pt")
    assert bound(pair) == expected
    assert models.facts_of(tmp_path / "model.pt") == {"data": "glyphs"}


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
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def resumed(sharpness, weights):
        networks = mlp()
        similarity = Weighted(weights, scales=[0.5, 3], names={"first": [1, None], 2: (True, "two")})
        train(tmp_path, (Model(networks), Looking(networks, similarity, sharpness, 6, "seven")), resume=True)

    resumed(0.5, torch.linspace(-1, 1, 5))
    with pytest.raises(ValueError, match=r"^resume: expected sharpness = 0.5 of .*Looking as in the .*, got 0.7$"):
        resumed(0.7, torch.linspace(-1, 1, 5))
    with pytest.raises(ValueError, match=r"^resume: expected weights = a tensor \[5\] of .*Weighted"):
        resumed(0.5, torch.linspace(-1, 2, 5))
    networks = mlp()
    with pytest.raises(ValueError, match=r"^resume: expected .* as in the checkpoint, got another one"):
        train(tmp_path, (Tempered(networks), Guide(networks)), resume=True)
    assert len((tmp_path / "checkpoint.pt").read_bytes()) == len(before)


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
