"""A small program whose address can be summed: the laboratory's gradients with a known answer."""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Draws from a mixture of Gaussians as a memory: an address, a latent near the entry, an observation near it.

    Args:
        role: which of the two programs.
        parameters: by name, as `toy` makes them.
    """

    def __init__(self, role: Literal["model", "guide"], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.role = role
        self.p = nn.ParameterDict({name: nn.Parameter(value) for name, value in parameters.items()})

    def forward(self, x: Tensor) -> None:
        """Run as model or as guide of observations x [B]."""
        p = self.p
        with pyro.plate("data", len(x)):
            if self.role == "model":
                a = pyro.sample("address", dist.Categorical(logits=torch.zeros(len(x), len(p["entries"]))))
                z = pyro.sample("z", dist.Normal(self._read(p["entries"], a), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            else:
                logits = -p["sharpness"].exp() * (x[:, None] - p["centres"]) ** 2
                a = pyro.sample("address", dist.Categorical(logits=logits))
                pyro.sample("z", dist.Normal(0.6 * x + self._read(p["shift"], a), p["scale"].exp()))

    @staticmethod
    def _read(table: Tensor, a: Tensor) -> Tensor:
        return (a * table).sum(-1) if a.is_floating_point() else table[a]  # a relaxed address reads a mean


def toy(size: int, images: int, seed: int) -> tuple[Toy, Toy, Tensor]:
    """Make model, guide and observations [images] of `size` entries; the guide is near the posterior."""
    noise = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=noise)

    entries = 2 * normal(size)
    guide = {
        "centres": entries + 0.5 * normal(size),
        "sharpness": torch.tensor(-1.0),
        "shift": 0.2 * entries + 0.2 * normal(size),
        "scale": torch.tensor(-0.5),
    }
    x = entries[torch.randint(size, (images,), generator=noise)] + normal(images)
    return Toy("model", {"entries": entries}), Toy("guide", guide), x
