"""DisARM for categorical values by stick-breaking: decisions one after the other to take a value or go on."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import CATEGORICAL, Drawn, as_values, by_element, positions, uniform
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.pairs import AntitheticPairs, CoupledELBO

NOTHING = -1e30  # in place of the logarithm of zero, whose sums have no gradient


class AntitheticSticks(AntitheticPairs):
    """Pairs of particles decide at each value, in opposite directions, whether to take it or go on."""

    families = CATEGORICAL
    expected = "categorical values"

    def draw_pairs(self, fn: Any, number: int) -> Drawn:
        """See `AntitheticPairs.draw_pairs`; there is nothing to remember."""
        log_q, log_rest = sticks(fn.logits)
        share = (log_q - torch.logaddexp(log_q, log_rest)).exp()  # of what is left
        u = uniform(number, share)
        taken = torch.cat([1 - u, u]) < share
        taken[..., -1] = True
        first = (~taken).long().cumprod(-1).sum(-1)
        return Drawn(as_values(fn, first))

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`: they part at the smaller value, and the other decides on by itself."""
        fn, _ = elementary(score.site["fn"])
        a, partner = positions(fn, score.site["value"])[[k, other]]
        log_each, log_rest = sticks(fn.logits[0])
        smaller, larger = torch.minimum(a, partner)[..., None], torch.maximum(a, partner)[..., None]
        rest = log_rest.gather(-1, smaller)
        alpha = log_each.gather(-1, smaller) - rest
        parted = alpha.detach().abs().sigmoid() * alpha - (log_each.gather(-1, larger) - rest)
        signed = torch.where(a < partner, parted[..., 0], -parted[..., 0])
        return by_element(score, torch.where(a == partner, 0.0, signed)[None]).squeeze(0)


def sticks(logits: Float[Tensor, "*elements S"]) -> tuple[Tensor, Tensor]:
    """Compute log q of each value, and of all values behind it, [*elements, S]."""
    log_q = logits.log_softmax(-1)
    log_q = torch.where(log_q == -torch.inf, NOTHING, log_q)
    behind = log_q.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return log_q, torch.cat([behind, torch.full_like(log_q[..., :1], NOTHING)], -1)


@final
class DisARMStickBreaking(CoupledELBO):
    r"""The evidence lower bound with pairs of categorical values, by antithetic decisions of a broken stick.

    .. math::
        \nabla_{\alpha_i} = \tfrac12 \big( f(a) - f(a') \big) \begin{cases}
            (b_i - b'_i) \, \sigma(|\alpha_i|) & i \le a, a' \\
            b_i - \sigma(\alpha_i) & a' < i \le a \\
            -(b'_i - \sigma(\alpha_i)) & a < i \le a' \end{cases}
        \qquad \sigma(\alpha_i) = \frac{q_i}{\sum_{j \ge i} q_j}

    where a is the first i with b_i = 1, and f = log w (Dong, Mnih & Tucker 2021). Unbiased for any order of the
    values; a draw takes S numbers, where that of `DisARMTree` takes log2 S. Several pairs are compared with each
    other as well.

    For arguments and errors see `CoupledELBO`.
    """

    values = "categorical"
    coupling = AntitheticSticks()
