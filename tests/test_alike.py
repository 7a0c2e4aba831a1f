"""Models are subtracted only if they differ in one thing: same likelihood, same updates, same data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from scripts import call, module
from torch import nn

from common import alike
from common.train import as_many
from vma_pyro import Guide, Likelihood, MLPNetworks, Model, models
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.program import ImageModel
from vma_pyro.training import TrainConfig, fit

EPISODE = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0).sample()
PROGRAMS = {"memoryless": (MemorylessModel, MemorylessGuide), "soft": (SoftAttentionModel, SoftAttentionGuide)}


def pair(model=Model, guide=Guide):
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
    return model(networks), guide(networks)


def log_prob(program):
    """log p(x | z, m) of the site x, and the output of its networks."""
    site = alike.trace_x(program, EPISODE)
    return site["fn"].log_prob(site["value"])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_an_edited_likelihood_is_everyones(program, scale, monkeypatch):
    """A Gaussian in place of the Bernoulli, by hand."""
    monkeypatch.setattr(ImageModel, "likelihood", lambda self, logits: dist.Normal(logits, scale).to_event(3))
    model, guide = pair(*PROGRAMS[program])
    site = alike.trace_x((model, guide), EPISODE)
    x, loc = EPISODE.x[:2], site["fn"].base_dist.loc
    each = -0.5 * ((x - loc) / scale) ** 2 - torch.tensor(scale).log() - 0.5 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), each.sum((1, 2, 3)))
    assert alike.compare_likelihoods((pair(), (model, guide)), EPISODE) is None


class LearnedScale(Likelihood):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, decoded):
        return dist.Normal(decoded, self.log_scale.exp()).to_event(3)


def test_models_with_a_likelihood_that_learns_may_have_learned_another():
    first = pair(lambda networks: Model(networks, likelihood=LearnedScale()))
    for model, guide in PROGRAMS.values():
        other = pair(lambda networks, model=model: model(networks, likelihood=LearnedScale()), guide)
        nn.init.constant_(other[0].likelihood.log_scale, 2.0)  # each learns its own
        assert alike.compare_likelihoods((first, other), EPISODE) is None


class Gaussian(Model):
    """A model of one's own, of which the comparisons know nothing."""

    def likelihood(self, logits):
        return dist.Normal(logits, 0.1).to_event(3)


class Narrow(MemorylessModel):
    def likelihood(self, logits):
        return dist.Normal(logits, 0.2).to_event(3)


class Wide(MemorylessModel):
    def likelihood(self, logits):
        return dist.Normal(logits, 0.1).to_event(3)


class Rescaled(MemorylessModel):
    def check_values(self, memory, x):
        """Of a likelihood for any number."""

    def forward(self, memory, x=None, *, num_images=1):
        return super().forward(memory, None if x is None else 2 * x - 1, num_images=num_images)

    def likelihood(self, logits):
        return dist.Normal(logits, 0.1).to_event(3)


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (MemorylessModel, "site 'x': expected the same likelihood in both models, got Normal and Bernoulli"),
        (Narrow, "site 'x': expected the same scale in both models, got 0.1.* and 0.2"),
        (Rescaled, "site 'x': expected both models to score the same values, got others"),
        (Wide, None),
    ],
)
def test_other_likelihoods_are_told_apart(other, line):
    found = alike.compare_likelihoods((pair(Gaussian), pair(other, MemorylessGuide)), EPISODE)
    if line is None:
        assert found is None
    else:
        assert re.match(line, found)


FACTS = {"updates": 100, "data": "glyphs", "queries": 32, "augment": "rotations"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"updates": 90}, "updates: expected as many for both models, got 100 and 90"),
        (
            {"updates": 90, "stopped_early": True},
            "updates: expected as many for both models, got 100 and 90, stopped early",
        ),
        (
            {"cycles": [{"updates": 60_000}]},
            "updates: expected as many for both models, got 100 and 60,000 + 100",
        ),
        ({"updates": 60, "cycles": [{"updates": 40}]}, None),
        ({"data": "omniglot"}, "data: expected the same for both models, got glyphs and omniglot"),
        ({"queries": 64}, "queries: expected the same for both models, got 32 and 64"),
    ],
)
def test_training_that_differs_is_named(change, line):
    pairs = pair(), pair(MemorylessModel, MemorylessGuide)
    assert alike.difference(pairs, (FACTS, FACTS | change), EPISODE) == line
    if line is not None:
        with pytest.raises(ValueError, match="^" + re.escape(line)):
            alike.check(pairs, (FACTS, FACTS | change), EPISODE)


def test_what_is_meant_to_differ_may():
    other = FACTS | {"augment": "none"}
    assert alike.difference((pair(), pair()), (FACTS, other), EPISODE, but_for="augment") is None


def test_as_many_updates_whatever_the_clock_and_validation_say(tmp_path):
    hurried = TrainConfig(minutes=1e-9, patience=1, learning_rate=1e-30, validate_every=1, accelerator="cpu")
    sampler = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    options = {"validation": [EPISODE], "show_progress": False}
    exact, patient = as_many(hurried, 7), replace(hurried, updates=9, minutes=9)
    for config, updates, early in ((exact, 7, False), (patient, 2, True)):
        result = fit(
            *pair(), MultiSampleELBO(3), sampler, config=config, folder=tmp_path / str(updates), **options
        )
        assert (result.updates, result.stopped_early) == (updates, early)


def test_after_other_training_the_report_says_why_there_is_no_gain(tmp_path, monkeypatch, capsys):
    """60,000 updates are behind the weights that the memory model trains on from."""
    monkeypatch.chdir(tmp_path)
    architecture = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": "memory"}
    facts = {"updates": 60_000}
    models.save("first.pt", models.build(architecture), data="glyphs", training=facts)
    call(module("few_shot"), "--tiny", "--accelerator=cpu", "--init=first.pt")
    why = "updates: expected as many for both models, got 60,000 + 2 and 2"
    assert f"note: no gain over no memory is reported; {why}" in capsys.readouterr().out
    results = json.loads(Path("runs/few_shot/results.json").read_text())
    assert (results["nll_gain"], results["no_gain"], results["kl"]["information_gained"]) == ({}, why, None)
    assert results["nll_memoryless"]["n"] == 4
    page = Path("runs/few_shot/report.md").read_text()
    assert f"| gain over none | no figure; {why} |" in page
    assert f"| information gained by the memory | {why} |" in page
    assert "Trained: memory model 60,000 + 2 updates (" in page
