"""Optimizers by name."""

import importlib.util

import pytest
import torch

from vma_pyro.training import TrainConfig
from vma_pyro.training.optimizers import OPTIMIZERS, make_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_goes_downhill_and_leaves_what_is_frozen(name):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv1d(1, 3, 2), torch.nn.Linear(3, 2))
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    x = torch.randn(6, 1, 5)

    def loss():
        return (module[1](module[0](x)) - 1).square().mean()

    optimizer = make_optimizer(name, module, 0.03)
    first = loss().item()
    for update in range(30):
        for group in optimizer.param_groups:
            group["progress"] = update / 30
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * first
    assert torch.equal(module[0].weight, frozen)


def test_one_line_where_the_package_of_soap_is_missing(monkeypatch):
    """Before a run, so that nothing is moved for one that cannot be."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^optimizer: soap wants the package pytorch-optimizer \(pip install"):
        TrainConfig(updates=2, optimizer="soap")
    assert TrainConfig(updates=2).optimizer == "muon"
