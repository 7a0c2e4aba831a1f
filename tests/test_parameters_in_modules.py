"""Programs that are plain modules, without a param statement: either way to a gradient gives the same."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from programs import CATEGORICAL
from vma_pyro.infer import make

SIZE, K = 4, 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.entries = nn.Parameter(torch.tensor([-2.0, -0.5, 0.4, 1.7]))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            address = pyro.sample("address", dist.Categorical(logits=torch.zeros(SIZE)))
            read = torch.einsum("...s,s->...", one_hot(address), self.entries)
            z = pyro.sample("z", dist.Normal(read, 1.0))
            pyro.sample("x", dist.Normal(z + read, 0.7), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.look, self.slide = nn.Linear(1, SIZE), nn.Linear(SIZE, 1)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            address = pyro.sample("address", dist.Categorical(logits=self.look(x.unsqueeze(-1))))
            pyro.sample("z", dist.Normal(self.slide(one_hot(address)).squeeze(-1), 0.8))


def one_hot(address):
    """[..., SIZE]; relaxed addresses have that shape already."""
    return address if address.is_floating_point() else nn.functional.one_hot(address, SIZE).float()


def gradients(model, guide):
    parameters = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    found = {name: p.grad for name, p in parameters.items()}
    model.zero_grad()
    guide.zero_grad()
    return found


@pytest.mark.parametrize("name", CATEGORICAL)
def test_both_ways_to_a_gradient_agree(name):
    model, guide, x = Model(), Guide(), torch.tensor([-1.0, 0.3, 2.0])
    torch.manual_seed(1)
    loss = make(name, K)(model, guide)(x)
    loss.backward()
    want = gradients(model, guide)
    torch.manual_seed(1)
    value = make(name, K).loss_and_grads(model, guide, x)
    got = gradients(model, guide)
    assert value == pytest.approx(loss.item())
    assert want["entries"].abs().max() > 0
    assert name == "exact" or want["look.weight"].abs().max() > 0  # which does not depend on q(a | x)
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], msg=parameter)
