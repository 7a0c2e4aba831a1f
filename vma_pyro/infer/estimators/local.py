r"""Local estimators of the K-sample bound: every particle in turn compares values of its own, given the others.

Given the others, particle k has a one-sample problem, f(.) = L(., a_-k), and any estimator of that serves:

.. math::
    \nabla_\phi L = -\sum_k v_k \nabla \log q(a_k) +
                    \sum_k \big[ \text{estimator with } f = L(\cdot, a_{-k}) \big]

where the first term is the derivative of -log q inside the weights. The values that a particle compares are runs
of the model; to put one of them in its place among the others is arithmetic of log weights.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import Drawn, by_element, element_log_probs
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite, log_mean_exp, normalised, weighted
from vma_pyro.infer.estimators.arms import DirichletCopula
from vma_pyro.infer.estimators.baselines import leave_one_out_logsumexp
from vma_pyro.infer.estimators.disarm import Antithetic
from vma_pyro.infer.estimators.pairs import draw_coupled, pair_surrogate


class LocalELBO(Estimator):
    """What local estimators share: they draw all particles at once, and know the K-sample bound."""

    objective = "iwae"
    unbiased = True
    values = "binary"
    _knows_rules = True

    def __init__(self, num_particles: int = 2, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        if self.noise == "common":
            self.objective = "iwae-coupled"  # a bound too, but another one


@final
class LocalDisARM(LocalELBO):
    r"""The K-sample bound; each particle is compared with its antithetic partner in its place.

    .. math::
        -\sum_k v_k \nabla \log q(b_k) + \sum_k \tfrac12 \big( L - L_k \big) \,
            (-1)^{b'_{kd}} \, 1[b_{kd} \ne b'_{kd}] \; \sigma(|\phi_d|), \qquad
        L_k = \log \tfrac1K \Big( w'_k + \sum_{l \ne k} w_l \Big)

    (Dong, Mnih & Tucker 2020, section 4.) 2K runs of the model. Here the partners are a set of K particles as
    well, and the mean over both sets is taken, which costs nothing more.

    Args:
        num_particles: K.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: a guide without a Bernoulli site that all particles draw from the same distribution.
    """

    def _all_particles(self) -> int:
        return 2 * self.num_particles

    def _estimate(self, programs: Programs) -> Estimate:
        particles, couple = draw_coupled(self, programs, Antithetic(), self._all_particles())
        sets = particles.log_weights.chunk(2)  # of [K, B]: the particles, and their partners
        bounds, v = [log_mean_exp(w).detach() for w in sets], [normalised(w) for w in sets]
        particles.open_gates(torch.cat(v))
        surrogate = (weighted(v[0], sets[0]) + weighted(v[1], sets[1])).sum() / 2
        one, other = (w.detach() for w in sets)
        # f(b_k) - f(b'_k) given the others, the mean over both sets of others.
        gain = (bounds[0] - in_place(one, other) + in_place(other, one) - bounds[1]) / 2  # [K, B]
        for score in particles.scores:
            log_q = score.log_prob
            if drawn := couple.drawn.get(score.name):
                log_q = (by_element(score, drawn.memory) * element_log_probs(score)).sum(-1)
            b, partner = log_q.chunk(2)
            surrogate = surrogate + (finite(gain) * (b - partner)).sum() / 2
        return Estimate((bounds[0] + bounds[1]) / 2, surrogate, particles.scale)


class Candidates(DirichletCopula):
    """The last `number` particles are coupled, and the others are drawn independently."""

    def __init__(self, number: int) -> None:
        self.number = number

    def draw(self, fn: Any, number: int) -> Drawn:
        """See `Coupling.draw`."""
        candidates = super().draw(fn, self.number)
        own = fn.sample((number - self.number,))
        return candidates._replace(values=torch.cat([own, candidates.values]))


@final
class LocalARMS(LocalELBO):
    r"""The K-sample bound; every particle compares the same n candidates, antithetic to each other, in its place.

    .. math::
        -\sum_k v_k \nabla \log q(b_k) + \text{`ARMS` over the candidates } c_j
            \text{ with } f_j = \sum_k \log \tfrac1K \Big( w(c_j) + \sum_{l \ne k} w_l \Big)

    (Dimitriev & Zhou 2021a, section 3.3; the released code takes the mean over k.) K + n runs of the model.

    Args:
        num_particles: K.
        candidates: n, at least 2.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: fewer than 2 candidates; a guide without a Bernoulli site that all particles draw from the same
            distribution.
    """

    def __init__(self, num_particles: int = 2, *, candidates: int = 2, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if candidates < 2:
            raise ValueError(f"candidates: expected at least 2, got {candidates}")
        self.candidates = candidates

    def _all_particles(self) -> int:
        return self.num_particles + self.candidates

    def _estimate(self, programs: Programs) -> Estimate:
        K, n = self.num_particles, self.candidates
        particles, couple = draw_coupled(self, programs, Candidates(n), K + n)
        own, candidates = particles.log_weights[:K], particles.log_weights[K:].detach()
        bound, v = log_mean_exp(own).detach(), normalised(own)
        particles.open_gates(torch.cat([v, torch.zeros_like(candidates)]))
        rest = leave_one_out_logsumexp(own.detach())[:, None]  # [K, 1, B]
        f = (torch.logaddexp(rest, candidates) - math.log(K)).sum(0)  # [n, B]
        surrogate = weighted(v, own).sum()
        for score in particles.scores:
            surrogate = surrogate + pair_surrogate(f, score, couple, last=n)
        return Estimate(bound, surrogate, particles.scale)


def in_place(log_weights: Float[Tensor, "K B"], others: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Compute the bound with the weight of each particle k in turn replaced by another one's."""
    rest = leave_one_out_logsumexp(log_weights)
    return torch.logaddexp(rest, others) - math.log(len(log_weights))
