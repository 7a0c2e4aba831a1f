"""A Gaussian mixture with amortised assignments: one discrete site, no continuous one."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

COMPONENTS = 6


class Mixture(nn.Module):
    """p(c) p(x | c): points in the plane from one of several Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.zeros(COMPONENTS))
        self.means = nn.Parameter(2 * torch.randn(COMPONENTS, 2, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> None:
        """Points x [B, 2]."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("component", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.means[c], self.log_scale.exp()).to_event(1), obs=x)


class Assignment(nn.Module):
    """q(c | x) by a small network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, COMPONENTS))

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        with pyro.plate("data", len(x)):
            pyro.sample("component", dist.Categorical(logits=self.network(x)))


def data() -> tuple[Tensor]:
    """32 points."""
    return (2 * torch.randn(32, 2, generator=torch.Generator().manual_seed(2)),)
