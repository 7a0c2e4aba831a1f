r"""The single-sample bound from a set of distinct values.

Draw k values without replacement from q, and forget the order: a set U. Below, m(T) is the probability left once
the values in T are taken, and

    F(T) = sum over s in U minus T of q_s / m(T) F(T + s),        F(U) = 1,

is the probability that the next draws are exactly the rest of U. So F({}) is the probability of the set, and
R(U, s) = F({s}) / F({}) makes sum over s in U of q_s R(U, s) f(s) an unbiased estimate of E f: the ratios are the
leave-one-out ratios of Kool et al. 2020, equation 9. Sums run over 2^k subsets, in log space.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.infer.engine.estimator import Estimate
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.subset import DistinctDraw, SubsetELBO, log_q_and_f


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
    most_particles = 12  # 2^k subsets

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


class SetRatios:
    """F of all subsets of a drawn set, from log q of its values and the log probability outside (-inf: none)."""

    def __init__(self, log_q: Float[Tensor, " k *B"], log_rest: Float[Tensor, " *B"]) -> None:
        self.log_q, self.k = log_q, len(log_q)
        masses = self._masses(log_rest)
        self.log_f = [torch.zeros_like(log_rest)] * (1 << self.k)
        for subset in range((1 << self.k) - 2, -1, -1):
            terms = [log_q[s] + self.log_f[subset | 1 << s] for s in range(self.k) if not subset >> s & 1]
            # Once no probability is left, any order of the rest will do.
            left = masses[subset] > -torch.inf
            masses[subset] = torch.where(left, masses[subset], 0.0)
            self.log_f[subset] = torch.where(left, torch.stack(terms).logsumexp(0) - masses[subset], 0.0)

    def _masses(self, log_rest: Tensor) -> list[Tensor]:
        """Compute log m of every subset by adding what is left: 1 - sum would cancel."""
        masses = [log_rest] * (1 << self.k)
        for subset in range((1 << self.k) - 2, -1, -1):
            s = (~subset & (subset + 1)).bit_length() - 1  # the lowest value that is not taken
            masses[subset] = torch.logaddexp(masses[subset | 1 << s], self.log_q[s])
        return masses

    def log_weights(self) -> Float[Tensor, " k *B"]:
        """Compute log q_s R(U, s): how much each value counts; q_s R(U, s) sums to one."""
        return torch.stack([self.log_q[s] + self.log_f[1 << s] for s in range(self.k)]) - self.log_f[0]

    def expectation_given_first(self, f: Float[Tensor, " k *B"]) -> Float[Tensor, " k *B"]:
        """Estimate E f, for each s without bias given that s was drawn first (Kool et al. 2020, eq. 12)."""
        rows = []
        for s in range(self.k):
            row = self.log_q[s].exp() * f[s]
            for other in range(self.k):
                if other != s:
                    ratio = self.log_f[1 << s | 1 << other] - self.log_f[1 << s]
                    row = row + (self.log_q[other] + ratio).exp() * f[other]
            rows.append(row)
        return torch.stack(rows)
