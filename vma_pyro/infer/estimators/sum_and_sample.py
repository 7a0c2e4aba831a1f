"""The single-sample bound with the most probable values summed."""

from __future__ import annotations

import math

import torch

from vma_pyro.infer.engine.estimator import Estimate
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.subset import DistinctDraw, SubsetELBO, log_q_and_f


class SumAndSampleELBO(SubsetELBO):
    r"""The evidence lower bound with the k - 1 most probable values summed, and one of the others drawn.

    .. math::
        L = \sum_{s \in C} q_s f(s) + (1 - q_C) f(s'), \qquad s' \sim q \text{ outside } C

    (Liu et al. 2019, equation 6; Rao-Blackwellised REINFORCE.) Its gradient differentiates q_s in the sum, and
    has the score of s' for the rest. At k = |support| it is exact.

    Args:
        num_particles: k, at least 2; at most the size of the support.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2

    def _estimate(self, programs: Programs) -> Estimate:
        draw = DistinctDraw(self.site, self.num_particles)
        particles = self._draw_values(programs, {self.site: draw.top_and_one})
        log_q, f = log_q_and_f(particles)  # [k, B]
        with torch.no_grad():
            log_weights = particles.log_q_enumerated[:, 0].clone()
            log_weights[-1] = particles.at_datapoints(draw.log_outside)  # one value stands for all outside the top
            weights = torch.where(particles.live[:, 0], log_weights.exp(), 0.0)
            # Every f is compared with the mean over the top, which does not depend on the sample.
            baseline = (log_weights[:-1].softmax(0) * f[:-1]).sum(0)
        # The 1 cancels the derivative of -log q(s) inside f.
        signal = finite(f.detach() - baseline)
        surrogate = (weights * (finite(f) + (signal + 1) * log_q)).sum()
        return Estimate((weights * f.detach()).nan_to_num(neginf=-math.inf).sum(0), surrogate, particles.scale)
