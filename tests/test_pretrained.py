"""The model that comes with the package: it loads, it is what its card says, and it knows what a lookup is."""

import json
import math

import pytest
import torch

from vma_pyro import Guide, Model, load_pretrained, models, pretrained
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.evaluation import classify, kl_report


@pytest.mark.parametrize(("name", "word"), [("omniglot", models.PRETRAINED), ("omniglot-causal", models.CAUSAL)])
def test_its_card(name, word):
    card = pretrained.card(name)
    assert card["name"] == name
    known = json.loads(json.dumps(models.facts_of(word)))  # which knows no tuples
    assert {name: known[name] for name in card["training"]} == card["training"]
    assert card["training"]["data"] == "omniglot"
    assert card["training"]["updates"] > 0
    assert "few_shot.py" in card["training"]["command"]
    assert "publish_model.py" in card["command"]
    for figure in (card["validation_nll"], *card["nll"].values(), *card["accuracy"].values()):
        assert 0 < figure["se"] < figure["mean"]
    assert set(card["accuracy"]) == {f"{ways}-way {shots}-shot" for ways in (5, 20) for shots in (1, 5)}
    assert pretrained.path_of(name).stat().st_size <= 8 * 2**20


def test_the_causal_one_goes_on_from_the_other():
    card, before = (pretrained.card(name)["training"] for name in ("omniglot-causal", "omniglot"))
    assert card["likelihood"] == "causal"
    assert before["updates"] in [cycle["updates"] for cycle in card["cycles"]]


@pytest.mark.parametrize("name", ["omniglot", "omniglot-causal"])
def test_it_looks_up_characters_of_another_kind(name):
    """Procedural glyphs, which it has never seen: far above chance, and nearly sure."""
    model, guide = load_pretrained(name)
    assert isinstance(model, Model)
    assert isinstance(guide, Guide)
    episode = EpisodeSampler(glyphs.load(classes=40, seed=1), classes=10, shots=1, queries=60, seed=0).sample()
    right = classify(guide, episode.memory, episode.x).argmax(-1) == episode.labels
    assert right.float().mean() > 0.6
    report = kl_report(model, guide, episode.memory, episode.x, labels=episode.labels, num_samples=5)
    assert 1.0 < report.kl_address.mean <= math.log(10)


def test_each_call_gives_a_model_of_its_own():
    (model, _), (other, _) = load_pretrained(), load_pretrained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert any(parameter.abs().max() > 0 for parameter in other.parameters())
