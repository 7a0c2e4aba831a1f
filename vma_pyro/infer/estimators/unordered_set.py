"""The single-sample bound from a set of distinct values."""

from __future__ import annotations

import math
from typing import Unpack

import torch

from vma_pyro._system.double import in_double
from vma_pyro.infer.engine.estimator import Estimate, Noise, PlateOptions
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.distinct_values import DistinctDraw
from vma_pyro.infer.estimators.set_ratios import MOST_VALUES, SetRatios
from vma_pyro.infer.estimators.subset import SubsetELBO, log_q_and_f


class UnorderedSetELBO(SubsetELBO):
    r"""The evidence lower bound from k distinct values of a discrete site.

    .. math::
        L = \sum_{s \in U} q_s R(U, s) f(s), \qquad f(s) = \log \frac{p(x, z_s, s)}{q(s) \, q(z_s \mid s)}, \qquad
        \nabla = \sum_{s \in U} q_s R(U, s) \big[ (f(s) - b(s)) \nabla \log q_s + \nabla_{\theta, z} f(s) \big]

    where U is drawn without replacement, R are its leave-one-out ratios, and b(s) is the estimate of E f from the
    rest of U (Kool et al. 2020, equations 9 and 12). No run of the model is spent on a repeated value; at
    k = |support| it is exact.

    Args:
        num_particles: k, from 2 to 12; at most the size of the support.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str = "address",
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, site=site, noise=noise, **plates)
        if num_particles > MOST_VALUES:
            raise ValueError(f"num_particles: expected at most {MOST_VALUES} values in a set, got {num_particles}")

    def _estimate(self, programs: Programs) -> Estimate:
        draw = DistinctDraw(self.site, self.num_particles)
        particles = self._draw_values(programs, {self.site: draw.without_replacement})
        log_q, f = log_q_and_f(particles)  # [k, B]
        ratios = SetRatios(
            in_double(particles.log_q_enumerated[:, 0].detach()), in_double(particles.at_datapoints(draw.log_rest))
        )
        weights = ratios.log_weights().exp()
        signal = in_double(f.detach()) - ratios.expectation_given_first(in_double(f.detach()))
        live = particles.live[:, 0]
        weights, signal = (torch.where(live, t.to(f), 0.0) for t in (weights, signal))
        # The 1 cancels the derivative of -log q(s) inside f.
        surrogate = (weights * (finite(f) + (finite(signal) + 1) * log_q)).sum()
        return Estimate((weights * f.detach()).nan_to_num(neginf=-math.inf).sum(0), surrogate, particles.scale)
