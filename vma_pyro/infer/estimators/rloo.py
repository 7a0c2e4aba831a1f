"""The single-sample bound with its own particles as baselines."""

from __future__ import annotations

import torch

from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.baselines import leave_one_out_sum


class RLOO(Estimator):
    r"""The evidence lower bound from K particles, each compared with the mean of the others.

    .. math::
        L = \frac1K \sum_k \log w_k, \qquad
        \nabla = \frac1K \sum_k \Big[ (\log w_k - \tfrac1{K-1} \sum_{l \ne k} \log w_l) \nabla \log q(a_k)
                 + \nabla_{\theta, z} \log w_k \Big]

    (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; Salimans & Knowles 2014.) The explicit
    derivative of -log q(a_k) inside log w_k has expectation zero and is left out.

    Args:
        num_particles: K, at least 2; the bound does not tighten with K, the gradient's variance falls like 1/K.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2
    _knows_rules = True

    def _estimate(self, programs: Programs) -> Estimate:
        particles = self._draw(programs, self.num_particles)
        log_w = particles.log_weights  # [K, B]
        particles.open_gates(torch.ones_like(log_w))  # every particle has a bound of its own: dreg is stl
        f = log_w.detach()
        others = leave_one_out_sum(f) / (len(f) - 1)
        coefficient = finite(f - others) + 1  # the 1 cancels the derivative of -log q(a_k) inside log w_k
        surrogate = (finite(log_w) + coefficient * particles.score).mean(0).sum()
        return Estimate(f.mean(0), surrogate, particles.scale)
