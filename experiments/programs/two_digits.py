"""Two discrete sites: whether a scene has a second object, and of which kind the objects are (after AIR).

The scene is a short signal. An object is one of several shapes, with a Gaussian size; the second is there or not,
and its kind depends on the first one's.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

KINDS, LENGTH = 4, 12


class Scene(nn.Module):
    """p(kind) p(second | kind) p(size) p(x | kind, second, size)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shapes = nn.Parameter(torch.randn(KINDS, LENGTH, generator=generator))
        self.second = nn.Parameter(torch.randn(KINDS, generator=generator))

    def forward(self, x: Tensor) -> None:
        """Signals x [B, LENGTH]."""
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=torch.zeros(KINDS)))
            second = pyro.sample("second", dist.Bernoulli(logits=self.second[kind]))
            size = pyro.sample("size", dist.Normal(1.0, 0.5))
            signal = size[..., None] * self.shapes[kind]
            signal = signal + second[..., None] * self.shapes[(kind + 1) % KINDS]
            pyro.sample("x", dist.Normal(signal, 0.5).to_event(1), obs=x)


class Inference(nn.Module):
    """q(kind | x) q(second | x, kind) q(size | x, kind)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = nn.Linear(LENGTH, KINDS)
        self.second = nn.Linear(LENGTH, KINDS)
        self.size = nn.Linear(LENGTH, KINDS)

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        rows = torch.arange(len(x))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=self.kind(x)))
            pyro.sample("second", dist.Bernoulli(logits=self.second(x)[rows, kind]))
            pyro.sample("size", dist.Normal(1 + 0.3 * self.size(x)[rows, kind], 0.3))


def data() -> tuple[Tensor]:
    """16 signals of the model's own making, with noise."""
    generator = torch.Generator().manual_seed(2)
    scene = Scene()
    kind = torch.randint(KINDS, (16,), generator=generator)
    x = scene.shapes.detach()[kind] + 0.5 * torch.randn(16, LENGTH, generator=generator)
    return (x,)
