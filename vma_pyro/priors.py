"""Priors p(a | M) of the address: modules from an encoded memory to logits, [S] or [B, S]."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.memory import Encoded
from vma_pyro.networks import Networks, at_least_32_bits, dtype_of


class UniformAddress(Part):
    """p(a | M) = 1 / |M|."""

    def forward(self, memory: Encoded) -> Float[Tensor, " S"]:
        """Return logits [S]."""
        return torch.zeros(memory.size, dtype=memory.dtype, device=memory.device)


class LearnedAddress(Part):
    """p(a | M) proportional to exp f(m_a): a network scores each entry by its key (figure 2B of the paper).

    Args:
        networks: the model's own, which make the keys.
        hidden_dim: width of the hidden layer of f.
    """

    def __init__(self, networks: Networks, *, hidden_dim: int = 64) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(networks.key_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1, bias=False)
        )

    def forward(self, memory: Encoded) -> Float[Tensor, "*own S"]:
        """Return logits [S] or [B, S]."""
        key = memory.features.key
        return at_least_32_bits(self.score(key.to(dtype_of(self))).squeeze(-1))
