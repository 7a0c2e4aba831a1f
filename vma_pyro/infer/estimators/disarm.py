"""DisARM: antithetic pairs of binary values, with the noise that they share integrated out."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import Drawn, by_element, uniform
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.pairs import AntitheticPairs, CoupledELBO


class Antithetic(AntitheticPairs):
    """Particle k and particle K/2 + k see opposite noise: b = 1[1 - u < theta] and b' = 1[u < theta]."""

    families = (torch.distributions.Bernoulli,)
    expected = "Bernoulli values"

    def draw_pairs(self, fn: Any, number: int) -> Drawn:
        """See `AntitheticPairs.draw_pairs`; remembers sigma(|phi|), the W of a pair that differs."""
        theta = fn.probs
        u = uniform(number, theta)
        values = torch.cat([1 - u, u]) < theta
        return Drawn(values.to(theta.dtype), fn.logits.abs().sigmoid()[None])

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`."""
        return by_element(score, drawn.memory).squeeze(0) * (log_q[k] - log_q[other])


@final
class DisARM(CoupledELBO):
    r"""The evidence lower bound with antithetic pairs of binary values, b and b'.

    .. math::
        \nabla_{\phi_d} = \tfrac12 \big( f(b) - f(b') \big) (-1)^{b'_d} \, 1[b_d \ne b'_d] \; \sigma(|\phi_d|)
            \qquad f = \log w, \quad \phi_d \text{ the logit of bit } d

    (Dong, Mnih & Tucker 2020, equation 6; the same as U2G, Yin et al. 2020.) Two runs of the model per pair, for
    any number of bits. Its variance is never above that of `ARM`. Several pairs are compared with each other as
    well: the pair formula with W = 1 between them.

    For arguments and errors see `CoupledELBO`.
    """

    values = "binary"
    coupling = Antithetic()
