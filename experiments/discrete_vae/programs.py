r"""Variational autoencoders with discrete latents, the field's benchmark, as plain Pyro programs.

.. math::
    p(x, b) = p(b) \, \prod_i \mathrm{Bernoulli}(x_i; \sigma(\mathrm{decoder}(2b - 1)_i)), \qquad
    q(b | x) = \prod_d \mathrm{Bernoulli}(b_d; \sigma(\mathrm{encoder}(x - \bar x)_d))

with 200 bits b, a learned p(b), the mean image of the training set, and its logit as the decoder's first bias
(Mnih & Gregor 2014; Dong, Mnih & Tucker 2020). In the categorical ones b is read as [latents, values], one-hot,
under a uniform prior (Liu et al. 2023), and images are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

BITS = 200
ModelName = Literal["linear", "nonlinear", "nonlinear-rodeo", "two-layers", "8x4", "4x24", "8x16", "64x8", "10x30"]


@dataclass(frozen=True)
class Architecture:
    """What a model is made of, and how the papers train it.

    Attributes:
        latents: number of latents of a layer.
        values: of a latent; 2 are a bit.
        hidden: units between latents and images, from the latents on.
        layers: of latents.
        slope: of a unit for negative values; 0 is a ReLU.
        batch: images per update.
        rate: of the optimizer.
        optimizer: class in `torch.optim`.
        prior_rate: of plain gradient descent on the prior's logits; 0 leaves them at 0.
        centred: whether the encoder sees images minus their mean.
    """

    latents: int = BITS
    values: int = 2
    hidden: tuple[int, ...] = ()
    layers: int = 1
    slope: float = 0.3
    batch: int = 50
    rate: float = 1e-4
    optimizer: str = "Adam"
    prior_rate: float = 1e-2
    centred: bool = True


def categorical(values: int, latents: int, optimizer: str, rate: float) -> Architecture:
    """The networks of the straight-through papers, which name them by values and latents: 4x24 has 48 bits."""
    return Architecture(latents, values, (256, 512), slope=0.0, batch=100, rate=rate, optimizer=optimizer)


ARCHITECTURES = {
    "linear": Architecture(),
    "nonlinear": Architecture(hidden=(200, 200)),
    "nonlinear-rodeo": Architecture(hidden=(200, 200), batch=100, rate=1e-3, prior_rate=0.0, centred=False),
    "two-layers": Architecture(layers=2),
    "8x4": categorical(8, 4, "Adam", 5e-4),
    "4x24": categorical(4, 24, "RAdam", 5e-4),
    "8x16": categorical(8, 16, "RAdam", 7e-4),
    "64x8": categorical(64, 8, "RAdam", 5e-4),
    "10x30": categorical(10, 30, "RAdam", 5e-4),
}


class Programs(NamedTuple):
    """A model and its guide, both of images x [B, pixels], and the names of their discrete sites."""

    model: nn.Module
    guide: nn.Module
    sites: tuple[str, ...]


def build(architecture: Architecture, mean: Float[Tensor, " P"]) -> Programs:
    """Make model and guide, with initial weights from torch's present noise.

    Args:
        architecture: what they are made of.
        mean: image of the training set.
    """
    a, pixels = architecture, len(mean)
    if a.values > 2:
        up = network([a.latents * a.values, *a.hidden, pixels], a.slope)
        down = network([pixels, *a.hidden[::-1], a.latents * a.values], a.slope)
        return Programs(CategoricalModel(up, a.latents, a.values), CategoricalGuide(down, a.values), ("c",))
    up = network([a.latents, *a.hidden, pixels], a.slope)
    with torch.no_grad():
        last: nn.Linear = list(up.modules())[-1]  # type: ignore[assignment]
        last.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
    down = network([pixels, *a.hidden[::-1], a.latents], a.slope)
    mean = mean if a.centred else torch.zeros_like(mean)
    if a.layers == 1:
        return Programs(BinaryModel(up, a.latents), BinaryGuide(down, mean), ("b",))
    between = [network([a.latents, *a.hidden, a.latents], a.slope) for _ in range(2)]
    return Programs(DeepModel(up, between[0], a.latents), DeepGuide(down, between[1], mean), ("b1", "b2"))


def network(sizes: Sequence[int], slope: float) -> nn.Sequential:
    """Make linear maps with (leaky) ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.LeakyReLU(slope) if slope else nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])


def bits(name: str, logits: Tensor) -> Tensor:
    """A site of independent bits."""
    b: Tensor = pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))
    return b


def observe(logits: Tensor, x: Tensor) -> None:
    """The site of the image."""
    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class BinaryModel(nn.Module):
    """p(b) p(x | b)."""

    def __init__(self, decoder: nn.Module, latents: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.prior = nn.Parameter(torch.zeros(latents))

    def forward(self, x: Tensor) -> None:
        """Images x [B, pixels]."""
        with pyro.plate("data", len(x)):
            b = bits("b", self.prior)
            observe(self.decoder(2 * b - 1), x)


class BinaryGuide(nn.Module):
    """q(b | x)."""

    mean: Tensor

    def __init__(self, encoder: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        with pyro.plate("data", len(x)):
            bits("b", self.encoder(x - self.mean))


class DeepModel(BinaryModel):
    """p(b2) p(b1 | b2) p(x | b1)."""

    def __init__(self, decoder: nn.Module, middle: nn.Module, latents: int) -> None:
        super().__init__(decoder, latents)
        self.middle = middle

    def forward(self, x: Tensor) -> None:
        """Images x [B, pixels]."""
        with pyro.plate("data", len(x)):
            b2 = bits("b2", self.prior)
            b1 = bits("b1", self.middle(2 * b2 - 1))
            observe(self.decoder(2 * b1 - 1), x)


class DeepGuide(BinaryGuide):
    """q(b1 | x) q(b2 | b1)."""

    def __init__(self, encoder: nn.Module, middle: nn.Module, mean: Tensor) -> None:
        super().__init__(encoder, mean)
        self.middle = middle

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        with pyro.plate("data", len(x)):
            b1 = bits("b1", self.encoder(x - self.mean))
            bits("b2", self.middle(2 * b1 - 1))


class CategoricalModel(nn.Module):
    """p(c) p(x | c), c uniform; integers are read as one-hot values, and weights over the values as they are."""

    logits: Tensor
    one_hot: Tensor

    def __init__(self, decoder: nn.Module, latents: int, values: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("logits", torch.zeros(latents, values))
        self.register_buffer("one_hot", torch.eye(values))

    def forward(self, x: Tensor) -> None:
        """Images x [B, pixels]."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits).to_event(1))
            weights = c if c.is_floating_point() else self.one_hot[c]  # [*, latents, values]
            observe(self.decoder(weights.flatten(-2)), x)


class CategoricalGuide(nn.Module):
    """q(c | x)."""

    def __init__(self, encoder: nn.Module, values: int) -> None:
        super().__init__()
        self.encoder, self.values = encoder, values

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        with pyro.plate("data", len(x)):
            logits = self.encoder(x).unflatten(-1, (-1, self.values))
            pyro.sample("c", dist.Categorical(logits=logits).to_event(1))
