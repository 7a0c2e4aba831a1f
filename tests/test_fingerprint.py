"""What decides on addresses is digested with an index: no change of it goes unnoticed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vma_pyro import AddressIndex, CosineSimilarity, Guide, MLPNetworks, Model

B, S = 3, 11


class Warm(Guide):
    """Has a temperature of its own, as a parameter."""

    def __init__(self, networks):
        super().__init__(networks)
        self.log_temperature = nn.Parameter(torch.zeros(()))


class Tempered(CosineSimilarity):
    """Has temperatures in all places where a module may have one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("buffered", torch.ones(()), persistent=False)
        self._private, self.array, self.scalar = 1.0, np.ones(2), np.float32(1.0)
        self.held = SimpleNamespace(inside=[1.0])


CHANGES = {
    "parameter of the guide": lambda model, guide: guide.log_temperature.data.fill_(-3.0),
    "parameter of the model": lambda model, guide: model.scale.data.fill_(2.0),
    "module of the guide": lambda model, guide: setattr(guide, "extra", nn.Linear(2, 3)),
    "likelihood of the guide": lambda model, guide: guide.likelihood.weight.data.fill_(3.0),
    "likelihood_scale of the model": lambda model, guide: model.likelihood_scale.weight.data.fill_(3.0),
    "buffer in no file": lambda model, guide: guide.similarity.buffered.fill_(0.3),
    "private number": lambda model, guide: setattr(guide.similarity, "_private", 0.3),
    "array": lambda model, guide: guide.similarity.array.fill(0.3),
    "number of numpy": lambda model, guide: setattr(guide.similarity, "scalar", np.float32(0.3)),
    "number in an object": lambda model, guide: guide.similarity.held.inside.__setitem__(0, 0.3),
}


def tempered():
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model, guide = Model(networks), Warm(networks)
    guide.similarity = Tempered()
    guide.likelihood, model.likelihood_scale = nn.Linear(2, 2), nn.Linear(2, 2)  # by name alone
    model.scale = nn.Parameter(torch.ones(()))
    return model, guide


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_may_decide_on_addresses_may_not_change(what, random_images, tmp_path):
    model, guide = tempered()
    index = AddressIndex.encode(model, guide, random_images(S))
    x = random_images(B)
    index.top(x, 2)
    index.kept.save(tmp_path / "index.pt")
    CHANGES[what](model, guide)
    for ask in (lambda: index.top(x, 2), lambda: AddressIndex.load(tmp_path / "index.pt", model, guide)):
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys, got others"):
            ask()


def test_the_likelihood_has_no_part_in_addresses(random_images):
    model, guide = tempered()
    index = AddressIndex.encode(model, guide, random_images(S))
    model.likelihood.temperature = 2.0
    index.top(random_images(B), 2)
