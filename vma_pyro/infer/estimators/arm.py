"""ARM: antithetic pairs of binary values, weighted with the noise that they share."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import Drawn, by_element, uniform
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.pairs import AntitheticPairs, CoupledELBO


class SharedNoise(AntitheticPairs):
    """The values of `Antithetic`, which remember u: b = 1[1 - u < theta] and b' = 1[u < theta]."""

    families = (torch.distributions.Bernoulli,)
    expected = "Bernoulli values"

    def draw_pairs(self, fn: Any, number: int) -> Drawn:
        """See `AntitheticPairs.draw_pairs`."""
        u = uniform(number, fn.probs)
        return Drawn((torch.cat([1 - u, u]) < fn.probs).to(fn.probs.dtype), u)

    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """See `PairCoupling.contrast`: (2u - 1) phi."""
        fn, _ = elementary(score.site["fn"])
        return by_element(score, (2 * drawn.memory[[k]] - 1) * fn.logits[:1]).squeeze(0)


@final
class ARM(CoupledELBO):
    r"""The evidence lower bound with antithetic pairs of binary values, b = 1[1 - u < q] and b' = 1[u < q].

    .. math::
        \nabla_{\phi_d} = \big( f(b) - f(b') \big) \, (u_d - \tfrac12), \qquad u_d \sim \mathrm{Uniform}(0, 1)

    (Yin & Zhou 2019, equation 6.) `DisARM` is its mean over u given b and b', and better; ARM is here to be
    compared with. Several pairs are compared with each other as well.

    For arguments and errors see `CoupledELBO`.
    """

    values = "binary"
    coupling = SharedNoise()
