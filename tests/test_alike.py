"""Models are subtracted only if they differ in one thing: same likelihood, same updates, same data."""

import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro import Guide, MLPNetworks, Model
from vma_pyro.baselines import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.jobs import alike

EPISODE = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0).sample()
PROGRAMS = {"memoryless": (MemorylessModel, MemorylessGuide), "soft": (SoftAttentionModel, SoftAttentionGuide)}


def pair(model=Model, guide=Guide):
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
    return model(networks), guide(networks)


def log_prob(program):
    """log p(x | z, m) of the site x, and the output of its networks."""
    site = alike.site_of(program, EPISODE)
    return site["fn"].log_prob(site["value"])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_an_edited_likelihood_is_everyones(program, scale, monkeypatch):
    """A Gaussian in place of the Bernoulli, by hand."""
    monkeypatch.setattr(Model, "likelihood", lambda self, logits: dist.Normal(logits, scale).to_event(3))
    monkeypatch.setattr(Model, "observed", lambda self, x: 2 * x.float() - 1)
    model, guide = pair(*PROGRAMS[program])
    site = alike.site_of((model, guide), EPISODE)
    x, loc = 2 * EPISODE.x[:2] - 1, site["fn"].base_dist.loc
    each = -0.5 * ((x - loc) / scale) ** 2 - torch.tensor(scale).log() - 0.5 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), each.sum((1, 2, 3)))
    assert alike.difference_of_likelihoods((pair(), (model, guide)), EPISODE) is None


def test_a_learned_part_of_the_likelihood_is_everyones(monkeypatch):
    init = Model.__init__

    def with_scale(self, networks, **options):
        init(self, networks, **options)
        self.log_scale = nn.Parameter(torch.zeros(()))

    monkeypatch.setattr(Model, "__init__", with_scale)
    monkeypatch.setattr(Model, "likelihood", lambda self, x: dist.Normal(x, self.log_scale.exp()).to_event(3))
    for program in PROGRAMS.values():
        other = pair(*program)
        nn.init.constant_(other[0].log_scale, 2.0)  # each learns its own
        assert alike.difference_of_likelihoods((pair(), other), EPISODE) is None


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
    def observed(self, x):
        return 2 * x - 1

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
    found = alike.difference_of_likelihoods((pair(Gaussian), pair(other, MemorylessGuide)), EPISODE)
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
