"""Similarities s(u, v) of a target's key u and an entry's key v: what q(a | x, M) is made of.

A similarity is a module from keys of targets [..., B, E] and of entries [S, E] or [B, S, E] to logits [..., B, S].
With a method `embed`, such that the logits are inner products of what it gives, it serves an index of a large
memory as well.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part


class CosineSimilarity(Part):
    """s(u, v) = scale * cos(u - c, v - c), with the scale learned; bounded, so no address starts impossible.

    # Departs from the paper: c is the mean key of the memory, because untrained keys have nearly one direction.
    Without centring q(a | x) starts uniform, the decoder learns to do without the memory, and thousands of updates
    pass before it looks there.

    Args:
        scale: initial scale.
        centred: whether c is the mean key of the memory, or 0 as in the paper.
    """

    def __init__(self, *, scale: float = 10.0, centred: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.centred = centred

    def forward(self, query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
        """Return logits [..., B, S] from [..., B, E] and [S, E] or [B, S, E]."""
        centre = keys.mean(-2, keepdim=True)  # [1, E] or [B, 1, E]; keys of padding leave it where it is
        return self.log_scale.exp() * inner(self.embed(query, centre.squeeze(-2)), self.embed(keys, centre))

    def embed(self, keys: Float[Tensor, "*any E"], centre: Float[Tensor, "*mean E"]) -> Float[Tensor, "*any E"]:
        """Return what the inner product compares, of keys of targets or entries; `centre` is the entries' mean."""
        return F.normalize(keys - centre if self.centred else keys, dim=-1)


class InnerProduct(Part):
    """s(u, v) = scale * <u, v>, with the scale learned.

    Args:
        scale: initial scale.
    """

    def __init__(self, *, scale: float = 0.1) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
        """Return logits [..., B, S] from [..., B, E] and [S, E] or [B, S, E]."""
        return self.log_scale.exp() * inner(query, keys)

    def embed(self, keys: Float[Tensor, "*any E"], centre: Float[Tensor, "*mean E"]) -> Float[Tensor, "*any E"]:
        """Return what the inner product compares: the keys themselves."""
        return keys


def inner(query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
    """Compute inner products [..., B, S] in float32 or better: a cosine rounded to bfloat16 ties entries."""
    common = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    query, keys = query.to(common), keys.to(common)  # which networks may give in less
    with torch.autocast(query.device.type, enabled=False):
        if keys.dim() == 2:
            return query @ keys.T
        return torch.einsum("...be,bse->...bs", query, keys)
