"""Models to compare with, on the same networks and with the same call signature (memory, x)."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from vma_pyro.memory import Memory, check_binary
from vma_pyro.networks import Networks


def blank_memory(networks: Networks, device: torch.device) -> Memory:
    """One entry without ink: conditioning on it tells the networks nothing."""
    return Memory(torch.zeros(1, *networks.image_shape, device=device))


class MemorylessModel(PyroModule):
    r"""The variational autoencoder :math:`p(x) = \int p(z) \, p(x \mid z) \, dz` on the networks of `Model`.

    Every m is the same blank image, so that the prior p(z) and the decoder keep all their layers (and the prior
    its learned location and scale) and nothing but the memory is missing.

    Args:
        networks: as in `Model`; share the object with `MemorylessGuide`.
    """

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, memory: Memory | Tensor | None, x: Tensor | None = None, *, num_images: int = 1) -> Tensor:
        """As `Model.forward`; the memory is ignored and may be None."""
        if x is not None:
            check_binary("x", x)
            x = x.float()
        networks = self.networks
        device = next(iter(networks.parameters())).device
        blank = blank_memory(networks, device).encode(networks)
        batch = num_images if x is None else len(x)
        with pyro.plate("data", batch, dim=-1):
            m = blank.read(torch.zeros(1, dtype=torch.long, device=device))  # broadcasts over the plate
            z = pyro.sample("z", dist.Normal(*networks.prior(m)).to_event(1))  # p(z)
            logits = networks.decode(z, m)
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)  # p(x | z)


class MemorylessGuide(PyroModule):
    """q(z | x) on the networks of `Guide`."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, memory: Memory | Tensor | None, x: Tensor) -> None:
        """Sample `z` for images x [B, 1, 28, 28]; the memory is ignored."""
        networks = self.networks
        blank = blank_memory(networks, x.device)
        blank.check(x)
        blank = blank.encode(networks)
        query = networks.query(x)
        with pyro.plate("data", len(x), dim=-1):
            m = blank.read(torch.zeros(1, dtype=torch.long, device=x.device))
            pyro.sample("z", dist.Normal(*networks.posterior(query, m)).to_event(1))  # q(z | x)
