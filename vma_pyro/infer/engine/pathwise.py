r"""Pathwise rules: the weight of the gradient through a reparameterised value z_k(phi).

The gradient of L = log 1/K sum_k w_k through z_k is v_k (d log w_k / d z_k) (d z_k / d phi) less v_k times the
score of q(z_k). The score has an expectation that can be written as another pathwise gradient; a rule says whether
it is left out (`detached`) and what factor makes up for it. With w detached in the parameters of q(z),

    sum_k v_k f_k (d log w_k / d z_k) (d z_k / d phi)

is the estimator, where f_k is a pure function of the normalised weight v_k = w_k / sum_l w_l and of s, the power
to which q(z_k) stands in w_k: 1, unless the site is scaled or masked.

The rules hold for a reparameterised site on which no other latent site of the guide depends; the others are
refused by name (they would need the generalised form of Bauer & Mnih 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class PathwiseRule(NamedTuple):
    """A rule for the gradient through reparameterised values.

    Attributes:
        name: for tables and errors.
        detached: whether the parameters of q(z) are held fixed inside log q(z).
        factor: f, from v and s (tensors that broadcast) to the factor on the gradient through z.
        unbiased: for K > 1, whether the expectation is the gradient of the bound.
    """

    name: str
    detached: bool
    factor: Callable[[Tensor, Tensor], Tensor]
    unbiased: bool


def _one(v: Tensor, s: Tensor) -> Tensor:
    return v.new_ones(())


def _doubly(v: Tensor, s: Tensor) -> Tensor:
    return 1 - s * (1 - v)


iwae = PathwiseRule("iwae", detached=False, factor=_one, unbiased=True)
"""The plain gradient of the bound, v_k (Burda et al. 2016, equation 13); its SNR falls with K."""

dreg = PathwiseRule("dreg", detached=True, factor=_doubly, unbiased=True)
"""Doubly reparameterised, v_k^2 for s = 1 (Tucker et al. 2018, equation 8); its SNR grows like sqrt(K)."""

stl = PathwiseRule("stl", detached=True, factor=_one, unbiased=False)
"""Sticking the landing, v_k (Roeder et al. 2017). Leaves the score out: biased for K > 1, unbiased for K = 1."""
