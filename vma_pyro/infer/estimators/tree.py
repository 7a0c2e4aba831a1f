"""DisARM for categorical values: each is a path through a binary tree, whose decisions are antithetic."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vma_pyro.infer.engine.coupled import CATEGORICAL, Drawn, as_values, by_element, positions, uniform
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.pairs import AntitheticPairs, CoupledELBO


class Branch(NamedTuple):
    """The nodes of one depth of the tree.

    Attributes:
        log_odds: of the right half of each node; 0 where one half is empty.
        open: where both halves have mass.
        right: where the right half has some.
    """

    log_odds: Float[Tensor, "*elements nodes"]
    open: Bool[Tensor, "*elements nodes"]
    right: Bool[Tensor, "*elements nodes"]

    def at(self, node: Int64[Tensor, "*N elements"]) -> Branch:
        """Look up a node of each element."""
        return Branch(*(_gathered(part, node) for part in self))

    def share(self) -> Tensor:
        """Compute the share of the right half."""
        return torch.where(self.open, self.log_odds.sigmoid(), self.right.to(self.log_odds.dtype))

    def log_prob(self, b: Tensor) -> Tensor:
        """Compute the log probability of going right (b = 1) or left, of a decision that was made."""
        return torch.where(self.open, F.logsigmoid((2 * b - 1) * self.log_odds), 0.0)


def tree_of(logits: Float[Tensor, "*elements S"]) -> list[Branch]:
    """Build a balanced tree of the values in their order, from the root on; behind them are empty leaves."""
    depth = max(1, math.ceil(math.log2(logits.shape[-1])))
    mass = F.pad(logits.log_softmax(-1), (0, 2**depth - logits.shape[-1]), value=-math.inf)
    branches = []
    for _ in range(depth):
        left, right = mass[..., 0::2], mass[..., 1::2]
        has_left, has_right = left > -math.inf, right > -math.inf
        # Without a gradient where there is none, as that of infinity would be NaN.
        finite_left, finite_right = torch.where(has_left, left, 0.0), torch.where(has_right, right, 0.0)
        both = has_left & has_right
        branches.append(Branch(torch.where(both, finite_right - finite_left, 0.0), both, has_right))
        joined = torch.logaddexp(finite_left, finite_right)
        alone = torch.where(has_left, left, right)
        mass = torch.where(both, joined, alone)
    return branches[::-1]


class AntitheticPaths(AntitheticPairs):
    """Pairs of particles go down the tree, in opposite directions as long as they are together."""

    families = CATEGORICAL
    expected = "categorical values"

    def draw_pairs(self, fn: Any, number: int) -> Drawn:
        """See `AntitheticPairs.draw_pairs`; the paths are in the values, and there is nothing to remember."""
        branches = tree_of(fn.logits)
        one = torch.zeros(number, *fn.logits.shape[:-1], dtype=torch.long, device=fn.logits.device)
        partner = one
        for branch in branches:
            u, own = (uniform(number, fn.logits[..., 0]) for _ in range(2))
            right = 1 - u < branch.at(one).share()
            right_of_partner = torch.where(one == partner, u, own) < branch.at(partner).share()
            one, partner = 2 * one + right, 2 * partner + right_of_partner
        return Drawn(as_values(fn, torch.cat([one, partner])))

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`: a node on both paths as in `DisARM`, one on a single path as log q."""
        fn, _ = elementary(score.site["fn"])
        logits, leaf = (
            fn.logits[0],
            positions(fn, score.site["value"])[[k, other]],
        )  # [*elements, S], [2, *elements]
        branches = tree_of(logits)
        total = torch.zeros_like(logits[..., 0])
        for depth, branch in enumerate(branches):
            decided = leaf >> (len(branches) - depth - 1)
            node, b = decided >> 1, (decided & 1).to(logits.dtype)
            found = branch.at(node)
            log_prob = found.log_prob(b)
            weight = found.log_odds[0].detach().abs().sigmoid()
            joint = torch.where(found.open[0], weight * (b[0] - b[1]) * found.log_odds[0], 0.0)
            total = total + torch.where(node[0] == node[1], joint, log_prob[0] - log_prob[1])
        return by_element(score, total[None]).squeeze(0)


@final
class DisARMTree(CoupledELBO):
    r"""The evidence lower bound with pairs of categorical values whose paths through a tree are antithetic.

    .. math::
        \nabla_{\alpha_i} = \tfrac12 \big( f(a) - f(a') \big) \begin{cases}
            (b_i - b'_i) \, \sigma(|\alpha_i|) & \text{node } i \text{ is on both paths} \\
            b_i - \sigma(\alpha_i) & \text{on the path of } a \text{ alone} \\
            -(b'_i - \sigma(\alpha_i)) & \text{on that of } a' \text{ alone} \end{cases}

    where :math:`\sigma(\alpha_i)` is the share of the right half of node i, and f = log w (Dong, Mnih & Tucker
    2021). A draw makes log2 S decisions, whatever the number S of values. Values that are like each other, such
    as entries of a class, should stand side by side. Several pairs are compared with each other as well.

    For arguments and errors see `CoupledELBO`.
    """

    values = "categorical"
    coupling = AntitheticPaths()


def _gathered(values: Tensor, node: Int64[Tensor, "*N elements"]) -> Tensor:
    """Gather values [*elements, nodes] at a node of each element, also of several particles."""
    values = values.expand(*node.shape, values.shape[-1])
    return values.gather(-1, node[..., None]).squeeze(-1)
