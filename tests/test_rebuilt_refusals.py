"""Nothing of what a stranger's file says is done unasked, and what cannot be said is refused with its reason."""

import copy
import re

import pyro.distributions as dist
import pytest
import torch
from own_parts import Free, Looking, Tempered, Weighted, bound, mlp, pairs, refused
from torch import nn

from vma_pyro import ContinuousBernoulli, Guide, InnerProduct, Model, models
from vma_pyro._system import checkpoint


def test_classes_that_are_not_allowed_are_named(tmp_path):
    pair = pairs()["tempered"]()
    models.save(tmp_path / "model.pt", pair)
    name = f"{Tempered.__module__}:Tempered"
    refused(tmp_path / "model.pt", "expected classes of vma_pyro, got", name, "classes=(Tempered,)", "--code")
    refused(tmp_path / "model.pt", "expected classes of vma_pyro or", name, classes=(Looking,))
    other = type("Tempered", (Tempered,), {"__module__": "elsewhere", "__qualname__": "Tempered"})
    refused(tmp_path / "model.pt", "expected classes of vma_pyro or elsewhere:Tempered", classes=(other,))
    for classes, line in (
        ((nn.Linear,), "classes: expected subclasses of vma_pyro.Part, got <class 'torch.nn"),
        (
            (
                Tempered,
                type("Tempered", (Tempered,), {"__module__": Tempered.__module__, "__qualname__": "Tempered"}),
            ),
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
            "Tempered",
            (Tempered,),
            {"__init__": init, "__module__": Tempered.__module__, "__qualname__": "Tempered"},
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


@pytest.mark.parametrize(
    "change",
    [
        lambda model, guide: setattr(guide, "similarity", InnerProduct()),
        lambda model, guide: setattr(guide, "networks", mlp(1)),
        lambda model, guide: setattr(guide.similarity, "centred", False),
        lambda model, guide: setattr(model, "likelihood", ContinuousBernoulli()),
    ],
)
def test_what_has_changed_since_it_was_made_is_not_made_again(change, tmp_path):
    """A file would say the arguments of the constructor, and another model would come back."""
    networks = mlp()
    model, guide = Model(networks), Guide(networks)
    models.save(tmp_path / "same.pt", (copy.deepcopy(model), copy.deepcopy(guide)))  # two networks, as they are
    change(model, guide)
    models.save(tmp_path / "changed.pt", (model, guide))
    refused(tmp_path / "changed.pt", "expected programs that can be made again, got ones of which ")


@pytest.mark.parametrize(
    "change",
    [
        {"program": 5},
        {"program": {}},
        {"program": {"sources": 5, "probe": {}}},
        {"program": {"sources": {}, "probe": {"model x": "b"}}},
        {"architecture": {"networks": ["x"], "program": "memory"}},
        {"architecture": [1]},
    ],
)
def test_malformed_facts_are_refused_in_one_line(change, written):
    refused(written(lambda content: content.update(change)))
