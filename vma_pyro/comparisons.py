"""Models to compare with: the same networks and likelihoods, the same call signature (memory, x)."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from vma_pyro._system.arguments import Arguments
from vma_pyro.memory import Encoded, Memory
from vma_pyro.networks import Networks, dtype_of
from vma_pyro.program import ImageModel, Program
from vma_pyro.similarity import CosineSimilarity


def blank_memory(networks: Networks) -> Memory:
    """Return one entry without ink: conditioning on it tells the networks nothing."""
    return Memory(torch.zeros(1, *networks.image_shape, device=next(networks.parameters()).device))


def blank_entry(memory: Encoded) -> Any:
    """Read the only entry of an encoded memory, with an address that broadcasts over the plate."""
    return memory.read(torch.zeros(1, dtype=torch.long, device=memory.device))


class MemorylessModel(ImageModel):
    r"""The variational autoencoder :math:`p(x) = \int p(z) \, p(x \mid z) \, dz` on the networks of `Model`.

    Every m is the same blank image, so that the prior p(z) and the decoder keep all their layers (and the prior
    its learned location and scale) and nothing but the memory is missing.

    Args:
        networks: as in `Model`; share the object with `MemorylessGuide`.
        likelihood: as in `Model`.
    """

    reads = False

    def forward(self, memory: Memory | Tensor | None, x: Tensor | None = None, *, num_images: int = 1) -> Tensor:
        """As `Model.forward`; the memory is ignored and may be None."""
        blank, x, data = self.opened(blank_memory(self.networks), x, num_images)
        with data:
            m = blank_entry(blank)
            z = pyro.sample("z", self.networks.prior(m))  # p(z)
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)  # p(x | z)


class MemorylessGuide(Program):
    """q(z | x) on the networks of `Guide`.

    Args:
        networks: as in `Guide`.
    """

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = networks

    def prepare(self, *args: Any, **kwargs: Any) -> Arguments:
        """Leave the memory as it is: nobody reads it."""
        return Arguments(args, kwargs)

    def forward(self, memory: Memory | Tensor | None, x: Tensor) -> None:
        """Sample `z` for images x [B, 1, 28, 28]; the memory is ignored."""
        blank, x, data = self.opened(blank_memory(self.networks), x)
        query = self.networks.query(x)
        with data:
            pyro.sample("z", self.networks.posterior(query, blank_entry(blank)))  # q(z | x)


class SoftAttentionModel(ImageModel):
    r"""Read a weighted mean of all entries instead of one.

    .. math:: p(x \mid M) = \int p(z) \, p(x \mid z, \bar m(z)) \, dz, \qquad
              \bar m(z) = \sum_a \pi_a(z) \, m_a, \qquad
              \pi(z) = \mathrm{softmax}_a \, s(f(z), e(m_a))

    The soft-attention baseline of Bornschein et al. 2017: the read is deterministic given z, so z has to say where
    to look, and every feature of every entry enters every read. p(z) is that of `MemorylessModel`; the networks
    are those of `Model`, plus f.

    Args:
        networks: as in `Model`; share the object with `SoftAttentionGuide`.
        hidden_dim: width of f.
        similarity: s, as in `Guide`.
        likelihood: as in `Model`.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        hidden_dim: int = 256,
        similarity: nn.Module | None = None,
        likelihood: nn.Module | None = None,
    ) -> None:
        super().__init__(networks, likelihood=likelihood)
        self.to_query = nn.Sequential(
            nn.Linear(networks.latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, networks.key_dim)
        )
        self.similarity = CosineSimilarity() if similarity is None else similarity

    def forward(self, memory: Memory | Tensor, x: Tensor | None = None, *, num_images: int = 1) -> Tensor:
        """As `Model.forward`."""
        memory, x, data = self.opened(memory, x, num_images)
        blank = blank_memory(self.networks).encode(self.networks)
        with data:
            z = pyro.sample("z", self.networks.prior(blank_entry(blank)))  # p(z)
            m = memory.read(self.attention(z, memory))
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)  # p(x | z, m(z))

    def attention(self, z: Tensor, memory: Encoded) -> Tensor:
        """pi(z), the weights of the entries of an encoded memory [..., B, S], for z [..., B, Z]; 0 on padding."""
        query = self.to_query(z.to(dtype_of(self.to_query)))
        return memory.masked(self.similarity(query, memory.features.key)).softmax(-1)


class SoftAttentionGuide(Program):
    r"""q(z | x), or q(z | x, M) with a soft read of its own that looks for x.

    Args:
        networks: as in `Guide`.
        target_guided: whether the posterior also sees a mean of the entries, weighted by their similarity to x, or
            x alone (default).
        similarity: of x to the entries, as in `Guide`.
    """

    def __init__(
        self, networks: Networks, *, target_guided: bool = False, similarity: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.networks = networks
        self.target_guided = target_guided
        if target_guided:
            self.similarity = CosineSimilarity() if similarity is None else similarity

    def forward(self, memory: Memory | Tensor, x: Tensor) -> None:
        """Sample `z` for images x [B, 1, 28, 28]."""
        memory, x, data = self.opened(memory, x)
        query = self.networks.query(x)
        with data:
            if self.target_guided:
                logits = memory.masked(self.similarity(query.key, memory.features.key))
                m = memory.read(logits.softmax(-1))
            else:
                m = blank_entry(blank_memory(self.networks).encode(self.networks))
            pyro.sample("z", self.networks.posterior(query, m))  # q(z | x, M)
