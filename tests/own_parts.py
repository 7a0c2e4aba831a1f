"""Parts of a user's own: classes that files of models name, and pairs of them."""

import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vma_pyro import CosineSimilarity, Guide, LearnedAddress, Memory, MLPNetworks, Model, Part, models
from vma_pyro.infer import MultiSampleELBO


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


class Free(nn.Module):
    """A similarity that says nothing of its arguments."""

    def forward(self, query, keys):
        return query @ keys.mT


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
