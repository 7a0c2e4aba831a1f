"""ARMS: K binary values that are antithetic to each other, by a Dirichlet copula."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import Drawn, by_element
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.pairs import CoupledELBO, PairCoupling


class DirichletCopula(PairCoupling):
    r"""All particles see noise that cannot be large for several of them at once.

    .. math::
        (d_1 \dots d_K) \sim \mathrm{Dirichlet}(1 \dots 1), \qquad u_k = (1 - d_k)^{K-1}

    is uniform for each k, and :math:`b_k` is :math:`1[u_k < \theta]` for :math:`\theta < \frac12`, else
    :math:`1[1 - u_k < \theta]`.
    """

    families = (torch.distributions.Bernoulli,)
    expected = "Bernoulli values"

    def draw(self, fn: Any, number: int) -> Drawn:
        """See `Coupling.draw`; remembers the W of a pair that differs."""
        u = copula(number, fn.probs)
        values = torch.where(fn.logits < 0, u < fn.probs, u > 1 - fn.probs)
        return Drawn(values.to(fn.probs.dtype), weight_of_unequal(fn.logits, number)[None])

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """See `PairCoupling.pairs`."""
        return itertools.combinations(range(number), 2)

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`."""
        return by_element(score, drawn.memory).squeeze(0) * (log_q[k] - log_q[other])


def copula(number: int, like: Float[Tensor, " *elements"]) -> Float[Tensor, " K *elements"]:
    """Draw uniform variables of the Dirichlet copula."""
    parts = torch.empty(number, *like.shape, dtype=like.dtype, device=like.device).exponential_()
    rest = parts.sum(0) - parts
    return (rest / (rest + parts)) ** (number - 1)


def weight_of_unequal(logits: Float[Tensor, " *elements"], number: int) -> Float[Tensor, " *elements"]:
    r"""Compute theta (1 - theta) / P(b_k = 1, b_l = 0), which is symmetric in theta and 1 - theta.

    With p the smaller of the two, n = K - 1, t = p^(1/n) and s = max(0, 2t - 1), the probability is t^n - s^n,
    here as (t - s)(t^(n-1) + ... + s^(n-1)), without a difference of two numbers that are nearly the same.
    """
    n = number - 1
    log_p = F.logsigmoid(-logits.abs())
    t, rest = (log_p / n).exp(), -torch.expm1(log_p / n)
    s = (t - rest).clamp_min(0)
    unequal = torch.minimum(t, rest) * sum(t ** (n - 1 - i) * s**i for i in range(n))
    weight = log_p.exp() * (-log_p.expm1()) / unequal
    return torch.where(unequal > 0, weight, 1.0)


@final
class ARMS(CoupledELBO):
    r"""The evidence lower bound with K binary values that are antithetic to each other.

    .. math::
        \nabla_{\phi} = \frac{\theta (1 - \theta)}{\theta - r_{11}} \, \frac1{K-1}
                        \sum_k (f_k - \bar f)(b_k - \theta), \qquad
        r_{11} = P(b_k = b_l = 1)

    element by element, f = log w (Dimitriev & Zhou 2021a, equation 10). K = 2 is `DisARM`.

    For arguments and errors see `CoupledELBO`.
    """

    values = "binary"
    coupling = DirichletCopula()
