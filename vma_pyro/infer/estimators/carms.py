"""CARMS: K categorical values that are antithetic to each other, by a Dirichlet copula over the values in line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vma_pyro.infer.engine.coupled import CATEGORICAL, Drawn, as_values, by_element, positions
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.arms import copula
from vma_pyro.infer.estimators.pairs import CoupledELBO, PairCoupling

MOST_VALUES = 32  # S; the table of pairs takes S^4 / 2 numbers for each site and datapoint while it is made


class CopulaInLine(PairCoupling):
    """The values lie on the unit interval in a random order, and particles read it at noise of the copula.

    Each pair of values is first and last in one of the orders, so that every pair can be drawn.
    """

    families = CATEGORICAL
    expected = "categorical values"

    def draw(self, fn: Any, number: int) -> Drawn:
        """See `Coupling.draw`; remembers the W of all pairs of values."""
        q = fn.probs  # [*elements, S]
        check_few(q.shape[-1])
        orders = orders_of(q.shape[-1]).to(q.device)
        chosen = orders[torch.randint(len(orders), q.shape[:-1], device=q.device)]  # [*elements, S]
        ends = q.gather(-1, chosen).cumsum(-1)
        u = copula(number, ends[..., 0])
        place = (u[..., None] >= ends[..., :-1]).sum(-1)  # [K, *elements]
        position = chosen.expand(number, *chosen.shape).gather(-1, place[..., None]).squeeze(-1)
        return Drawn(as_values(fn, position), weights_of_pairs(q, orders, number))

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """See `PairCoupling.pairs`."""
        return itertools.combinations(range(number), 2)

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`."""
        fn, _ = elementary(score.site["fn"])
        s, t = positions(fn, score.site["value"])[[k, other]]
        size = drawn.memory.shape[-1]
        weight = drawn.memory.flatten(-2).gather(-1, (s * size + t)[..., None])[..., 0]
        return by_element(score, weight[None]).squeeze(0) * (log_q[k] - log_q[other])


def check_few(values: int) -> None:
    """Refuse more values than a table of pairs is made for."""
    if values > MOST_VALUES:
        raise ValueError(
            f"CARMS: expected at most {MOST_VALUES} values, as a table of all pairs is made, got {values}; use "
            "DisARMTree"
        )


def orders_of(size: int) -> Int64[Tensor, "orders S"]:
    """List orders of the values, so that each pair is first and last in one of them."""
    pairs = itertools.combinations(range(size), 2)
    rows = [[s, *(v for v in range(size) if v not in (s, t)), t] for s, t in pairs]
    return torch.tensor(rows or [[0]])


def weights_of_pairs(
    q: Float[Tensor, "*elements S"], orders: Int64[Tensor, "orders S"], number: int
) -> Float[Tensor, "*elements S S"]:
    r"""Compute W(s, t) = q_s q_t / r(s, t), with r the mean over all orders.

    .. math:: r(s, t) = C(R_s, R_t) - C(L_s, R_t) - C(R_s, L_t) + C(L_s, L_t), \qquad
              C(t, t') = \max(0, t^{1/(K-1)} + t'^{1/(K-1)} - 1)^{K-1}

    with the ends L and R of the values' intervals, in double precision, as the four nearly cancel.
    """
    exact = q if q.device.type == "mps" else q.double()
    power = 1 / (number - 1)
    total = exact.new_zeros(*q.shape, q.shape[-1])
    for order in orders:
        right = exact[..., order].cumsum(-1).clamp(max=1.0)
        right[..., -1] = 1.0
        left = torch.cat([torch.zeros_like(right[..., :1]), right[..., :-1]], -1)
        back = order.argsort()
        low, high = (ends[..., back] ** power for ends in (left, right))

        def joint(a: Tensor, b: Tensor) -> Tensor:
            return (a[..., :, None] + b[..., None, :] - 1).clamp_min(0) ** (number - 1)

        total += joint(high, high) - joint(low, high) - joint(high, low) + joint(low, low)
    r = total / len(orders)
    weights = exact[..., :, None] * exact[..., None, :] / r
    return torch.where(r > 0, weights, 1.0).to(q.dtype)


@final
class CARMS(CoupledELBO):
    r"""The evidence lower bound with K categorical values that are antithetic to each other.

    .. math::
        \nabla_\phi = \frac1{K(K-1)} \sum_{k < l} (f_k - f_l) \, \frac{q(a_k) \, q(a_l)}{r(a_k, a_l)} \,
                      \nabla \big[ \log q(a_k) - \log q(a_l) \big], \qquad f = \log w

    element by element, where r(s, t) is the probability that two particles have the values s and t (Dimitriev &
    Zhou 2021b). For few values: the table of r takes S^2 numbers per element, and S^4 / 2 operations. The released
    code clips the weights, which is biased; here they are exact.

    For arguments and errors see `CoupledELBO`; more than 32 values are refused.
    """

    values = "categorical"
    coupling = CopulaInLine()
