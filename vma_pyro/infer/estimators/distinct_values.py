"""Drawing distinct values of a discrete site."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro.infer.engine.distributions import whole_support


class DistinctDraw:
    """Draws distinct values of one site, and remembers the probability of those that were not drawn."""

    def __init__(self, site: str, k: int) -> None:
        self.site, self.k = site, k

    def without_replacement(self, fn: Any) -> Tensor:
        """Draw k values one after the other, [k, *batch, *event]."""
        with torch.no_grad():
            log_probs = self._log_probs(fn)
            values = draw_distinct(log_probs, self.k)
            self.log_rest = left_over(log_probs, values)
        return _at(fn, values)

    def top_and_one(self, fn: Any) -> Tensor:
        """Take the k - 1 most probable values, and draw one from the others, [k, *batch, *event]."""
        log_probs = self._log_probs(fn)
        with torch.no_grad():
            top = log_probs.topk(self.k - 1, dim=-1).indices.movedim(-1, 0)
            outside = torch.zeros_like(log_probs).scatter(-1, top.movedim(0, -1), -torch.inf)
            one = draw_distinct(log_probs + outside, 1)
            values = torch.cat([top, one])
        # Where nothing is left, -inf without a gradient: that of logsumexp would be NaN.
        rest = log_probs + outside
        nothing = (rest == -torch.inf).all(-1)
        sums = torch.where(nothing[..., None], 0.0, rest).logsumexp(-1)
        self.log_outside = torch.where(nothing, -torch.inf, sums)  # differentiable
        return _at(fn, values)

    def _log_probs(self, fn: Any) -> Float[Tensor, "*B S"]:
        """Compute log q of the whole support, normalised."""
        support = whole_support(fn)
        if len(support) < self.k:
            raise ValueError(
                f"num_particles: expected at most the {len(support)} values of site '{self.site}', got {self.k}"
            )
        log_probs = fn.log_prob(support).movedim(0, -1)
        return log_probs.expand(*fn.batch_shape, len(support)).log_softmax(-1)


def _at(fn: Any, index: Tensor) -> Tensor:
    """Look up the values of the support at positions [k, *batch]."""
    support = whole_support(fn)
    return support.reshape(len(support), *fn.event_shape)[index]


def draw_distinct(log_probs: Float[Tensor, "*B S"], k: int) -> Int[Tensor, " k *B"]:
    """Draw k distinct values by the Gumbel top-k trick (Kool et al. 2019), and keep their order."""
    gumbel = -torch.empty_like(log_probs).exponential_().log()
    return (log_probs + gumbel).topk(k, dim=-1).indices.movedim(-1, 0)


def left_over(log_probs: Float[Tensor, "*B S"], values: Int[Tensor, " k *B"]) -> Float[Tensor, " *B"]:
    """Compute the log probability outside a set, without cancellation."""
    taken = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, values.movedim(0, -1), True)
    return log_probs.masked_fill(taken, -torch.inf).logsumexp(-1)
