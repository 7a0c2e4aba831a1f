r"""Expectations under standard normal latents of few dimensions, by the trapezoidal rule.

.. math::
    \int f(z) \, \mathcal N(z; 0, I) \, dz \approx \sum_i h^d \, \mathcal N(z_i; 0, I) \, f(z_i), \qquad
    z_i \text{ on a lattice of spacing } h

For smooth f the error falls faster than any power of h (Trefethen & Weideman 2014), like exp(-2 (pi s / h)^2) for
an integrand that is about as wide as a Gaussian of standard deviation s.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

REACH = 6.0  # standard deviations: beyond is 2e-9 of the mass in each dimension


def lattice(dimensions: int, points: int) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    """Make the nodes of the rule and the logarithms of their weights, in float64.

    Args:
        dimensions: D, of the latent.
        points: in each dimension, so that N = points^D.
    """
    axis = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
    nodes = torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions)
    log_weights = torch.distributions.Normal(0.0, 1.0).log_prob(nodes) + (axis[1] - axis[0]).log()
    return nodes, log_weights.sum(-1)
