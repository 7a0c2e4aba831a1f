"""The generative model. This is the file to edit: plain Pyro, in the order of the paper's equations."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.memory import Memory
from vma_pyro.memory.checks import check_binary
from vma_pyro.networks import Networks, at_least_32_bits, dtype_of
from vma_pyro.program import Program


class Model(Program):
    r"""Generate an image by varying one entry of the memory.

    .. math:: p(x, z, a \mid M) = p(a \mid M) \, p(z \mid m_a) \, p(x \mid z, m_a)

    Bornschein et al. 2017, equation 3. Sites `address` (a, categorical), `z` (Gaussian) and `x` (binary image),
    all in the plate `data` at dimension -1.

    Args:
        networks: p(z | m) and p(x | z, m); share the object with the guide to tie the pyramids.
        address_prior: a module from a memory to the logits of p(a | M), [S] or [B, S]; uniform by default. It may
            ignore the memory's mask, as what it says of padding is not looked at.
    """

    def __init__(self, networks: Networks, *, address_prior: nn.Module | None = None) -> None:
        super().__init__()
        self.networks = networks
        self.address_prior = UniformAddress() if address_prior is None else address_prior

    def forward(self, memory: Memory | Tensor, x: Tensor | None = None, *, num_images: int = 1) -> Tensor:
        """Sample images, or score those given.

        Args:
            memory: binary entries [S, 1, 28, 28], or [B, S, 1, 28, 28] for one memory per image.
            x: observed binary images [B, 1, 28, 28]; None to generate.
            num_images: B when generating from a shared memory.

        Returns:
            The images, [B, 1, 28, 28] with the dimensions of enclosing plates in front.
        """
        memory = Memory.of(memory)
        if x is not None:
            memory.check(x)
        self.check_values(memory, x)
        batch = memory.batch_size or check_number(num_images) if x is None else len(x)
        networks = self.networks  # once: Pyro registers all parameters whenever it is asked for a module
        memory = memory.encoded(networks, x)  # once per update, shared with the guide
        observed = None if x is None else x.to(memory.dtype)
        with pyro.plate("data", batch, dim=-1):
            logits = memory.masked(self.address_prior(memory))  # padding is no entry
            address = pyro.sample("address", dist.Categorical(logits=logits))  # p(a | M)
            m = memory.read(address)  # m_a
            z = pyro.sample("z", dist.Normal(*networks.prior(m)).to_event(1))  # p(z | m_a)
            return pyro.sample("x", self.likelihood(networks.decode(z, m)), obs=observed)  # p(x | z, m_a)

    # The models that this one is compared with (baselines.py) have these two from here: another likelihood here is
    # another one there.

    def likelihood(self, logits: Tensor) -> Any:
        """p(x | z, m), a distribution of images, by what the decoder makes of z and m [..., B, 1, 28, 28]."""
        return dist.Bernoulli(logits=logits).to_event(3)

    def check_values(self, memory: Memory | None, x: Tensor | None) -> None:
        """Refuse entries and images that the likelihood cannot score; for shades of grey leave this empty."""
        if memory is not None:
            memory.check_binary()
        if x is not None:
            check_binary("x", x)


def check_number(num_images: int) -> int:
    """Refuse to generate nothing."""
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    return num_images


class UniformAddress(Part):
    """p(a | M) = 1 / |M|."""

    def forward(self, memory: Memory) -> Float[Tensor, " S"]:
        """Logits [S]."""
        return torch.zeros(memory.size, dtype=memory.dtype, device=memory.entries.device)


class LearnedAddress(Part):
    """p(a | M) proportional to exp f(m_a): a network scores each entry by its key (figure 2B of the paper)."""

    def __init__(self, networks: Networks, *, hidden_dim: int = 64) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(networks.key_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1, bias=False)
        )

    def forward(self, memory: Memory) -> Float[Tensor, "*own S"]:
        """Logits [S] or [B, S]."""
        key = memory.features.key
        return at_least_32_bits(self.score(key.to(dtype_of(self))).squeeze(-1))
