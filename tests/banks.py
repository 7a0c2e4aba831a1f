"""A bank of a few images, and programs on it whose bound is a finite sum."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from vma_pyro import MLPNetworks, Model
from vma_pyro.memory import BankMemory, KeyedBank
from vma_pyro.retrieval import RetrievalGuide

N, S, B, K, E = 13, 11, 3, 2, 5
ROWS = torch.tensor([0, 12, 3, 4, 1, 6, 7, 9, 10, 11, 2])  # of the bank; S of them
OUT = torch.tensor([1, 10, 4])


class Weighted(nn.Module):
    """A prior that is not uniform, and not of what the entries hold."""

    def __init__(self, size=S):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, memory):
        assert memory.size == len(self.logits)
        return self.logits


class WithoutZ(Model):
    """The model at the mean of p(z | m): its bound is a finite sum over addresses."""

    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            logits = memory.masked(self.address_prior(memory))
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
            z = self.networks.prior(m).mean
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)


class GuideWithoutZ(RetrievalGuide):
    def forward(self, memory, x):
        memory, x, data = self.opened(memory, x)
        with data:
            pyro.sample("address", self.proposal(memory, self.networks.query(x)))


def programs(kind=Model, *, prior=True, **options):
    torch.manual_seed(2)
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=E).double()
    model = kind(networks, address_prior=Weighted() if prior else None)
    options = {"candidates": 4, "least": 2, "share": 0.2} | options
    guide = (RetrievalGuide if kind is Model else GuideWithoutZ)(networks, **options)
    return model.double(), guide.double()


def bank(images, **options):
    return KeyedBank(images, torch.arange(N) % 4, **{"key_dtype": torch.float32} | options)


def memory_of(bank, *, left_out=False):
    return BankMemory(bank, ROWS, OUT if left_out else None)


def without_a_gradient(loss_fn):
    """Names of the parameters that an update would leave alone."""
    found = [n for n, p in loss_fn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # It shifts all scores of an image alike, which their softmax does not see: zero but for rounding.
    return [n for n in found if not n.endswith("to_key.bias")]
