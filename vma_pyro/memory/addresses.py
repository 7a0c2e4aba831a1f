"""Addresses of some entries among very many, and the best of what several chunks hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Addresses(NamedTuple):
    """Some addresses for each query.

    Attributes:
        address: entries [B, k].
        log_prob: log q(a | x, M) among all entries [B, k].
    """

    address: Int[Tensor, "B k"]
    log_prob: Float[Tensor, "B k"]


def best_of_both(
    best: Float[Tensor, "B k"], where: Int[Tensor, "B k"], values: Float[Tensor, "B n"], at: Int[Tensor, "B n"]
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Keep the k best of those found so far and those of one more chunk, with where they are."""
    kept, order = torch.cat([best, values], 1).topk(best.shape[1], dim=1)
    return kept, torch.cat([where, at], 1).gather(1, order)
