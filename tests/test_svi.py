"""Pyro's SVI trains the parameters that have a gradient, or the first step says why it would not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.infer import MultiSampleELBO, make

X = torch.tensor([0.3, 1.0, -0.5])


class Mean(nn.Module):
    """A plain module: it makes no param statements."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.layer(z[..., None]).squeeze(-1), 1.0), obs=x)


class Registered(Mean):
    def forward(self, x):
        pyro.module("mean", self)
        super().forward(x)


class AsPyroModule(PyroModule, Mean):
    pass


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))


def step(model, elbo=None, guide=guide, args=(X,), steps=1):
    before = [p.detach().clone() for p in model.parameters()]
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo or make("vimco", 2))
    for _ in range(steps):
        svi.step(*args)
    return all(bool((p != b).any()) for p, b in zip(model.parameters(), before, strict=True))


def memory_pair(size=3):
    networks = MLPNetworks(size, hidden_dims=(8, 4), key_dim=4)
    return Model(networks), Guide(networks)


MEMORY = ((torch.arange(2 * 784) % 3 == 0).float().reshape(2, 1, 28, 28), torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", ["vimco", "rloo", "wake-wake", "vimco+dreg+resampled", "pyro-graph"])
def test_parameters_that_svi_would_not_train(local, name):
    with pyro.settings.context(module_local_params=local):
        with pytest.raises(ValueError, match="parameter 'layer|train 'layer") as error:
            step(Mean(), make(name, 2))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Registered, AsPyroModule])
def test_parameters_that_svi_trains(kind):
    with pyro.settings.context(module_local_params=False):
        assert step(kind(), steps=2)


def test_the_setting_that_has_to_change_is_named():
    model, guide = memory_pair()
    args = (Memory(MEMORY[0]), MEMORY[1])
    elbo = MultiSampleELBO(2, max_plate_nesting=1)
    with pytest.raises(ValueError, match="module_local_params: expected False under pyro.infer.SVI"):
        step(model, elbo, guide, args)
    with pyro.settings.context(module_local_params=False):
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
        before = [p.detach().clone() for p in guide.parameters()]
        svi.step(*args)
        moved = [bool((p != b).any()) for p, b in zip(guide.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("kind", ["networks", "layer"])
def test_a_second_model_in_a_session_whose_store_was_not_cleared(kind):
    with pyro.settings.context(module_local_params=False):
        for attempt in range(2):
            model, its_guide = memory_pair() if kind == "networks" else (Registered(), guide)
            args = (Memory(MEMORY[0]), MEMORY[1]) if kind == "networks" else (X,)
            if attempt == 0:
                step(model, None, its_guide, args)
                continue
            with pytest.raises(
                ValueError, match="found .* call pyro.clear_param_store.. before a new model"
            ) as error:
                step(model, None, its_guide, args)
            assert "\n" not in str(error.value)
        pyro.clear_param_store()
        step(model, None, its_guide, args)


def test_no_word_where_the_caller_takes_the_gradients_himself():
    model = Mean()
    make("vimco", 2).loss_and_grads(model, guide, X)
    assert model.layer.weight.grad is not None
