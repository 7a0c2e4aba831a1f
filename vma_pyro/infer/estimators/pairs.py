r"""The pair formula, from which estimators with coupled particles follow.

.. math::
    \nabla_{\phi_d} = \frac1{K(K-1)} \sum_{k < l} (f_k - f_l) \, W_d(a_{kd}, a_{ld}) \,
                      \nabla \big[ \log q_d(a_{kd}) - \log q_d(a_{ld}) \big], \qquad
    W_d(s, t) = \frac{q_d(s) \, q_d(t)}{r_d(s, t)}, \quad s \ne t

for K particles that are coupled element by element: r_d(s, t) is the probability that two of them have s and t at
element d. It is unbiased if all pairs that are possible under independent draws can occur. W = 1 is leave-one-out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.coupled import Couple, Coupling, Drawn, element_log_probs
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.particles import Particles, SiteScore
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.baselines import leave_one_out_sum


class PairCoupling(Coupling):
    """A coupling of groups of particles, whose W is known."""

    @abstractmethod
    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """Go through the pairs (k, l), k < l, whose draws depend on each other; for all others W is 1."""

    @abstractmethod
    def contrast(
        self, score: SiteScore, drawn: Drawn, log_q: Float[Tensor, "K B D"], k: int, other: int
    ) -> Float[Tensor, "B D"]:
        """Compute what (f_k - f_l) / 2 goes with in the surrogate: W (log q(a_k) - log q(a_l)), W held fixed."""


class AntitheticPairs(PairCoupling):
    """A coupling of particle k with particle K/2 + k; of an odd number the last is alone."""

    @abstractmethod
    def draw_pairs(self, fn: Any, number: int) -> Drawn:
        """Draw so many pairs, the partners behind: values [2 number, *elements]."""

    def draw(self, fn: Any, number: int) -> Drawn:
        """See `Coupling.draw`."""
        drawn = self.draw_pairs(fn, number // 2)
        if number % 2 == 0:
            return drawn
        alone = fn.sample()[None].to(drawn.values.dtype)
        return drawn._replace(values=torch.cat([drawn.values, alone]))

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """See `PairCoupling.pairs`."""
        return ((k, number // 2 + k) for k in range(number // 2))


class CoupledELBO(Estimator):
    r"""The evidence lower bound from K particles whose discrete draws are coupled; see the subclasses.

    Sites that the coupling cannot take (another family, or a distribution that earlier draws decide) are drawn
    independently and compared with the mean of the other particles, as in `RLOO`.

    Args:
        num_particles: K, at least 2. Where particles are coupled in pairs, one of an odd number is alone.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: a guide in which no discrete site can be coupled.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2
    coupling: ClassVar[PairCoupling]
    _knows_rules = True

    def __init__(self, num_particles: int = 2, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")

    def _estimate(self, programs: Programs) -> Estimate:
        particles, couple = draw_coupled(self, programs, self.coupling, self.num_particles)
        log_w = particles.log_weights  # [K, B]
        particles.open_gates(torch.ones_like(log_w))  # every particle has a bound of its own: dreg is stl
        # The score, whose mean is zero, takes the derivative of -log q(a) out of log w.
        surrogate = (finite(log_w) + particles.score).mean(0).sum()
        for score in particles.scores:
            surrogate = surrogate + pair_surrogate(log_w.detach(), score, couple)
        return Estimate(log_w.detach().mean(0), surrogate, particles.scale)


def draw_coupled(
    elbo: Estimator, programs: Programs, coupling: Coupling, number: int, **options: Any
) -> tuple[Particles, Couple]:
    """Draw so many particles for an objective, with coupled values where that is possible."""
    nesting = elbo._nesting(programs)
    couple = Couple(coupling, nesting)
    watched = replace(programs, guide=couple.watch(programs.guide))
    particles = elbo._draw(watched, number, handlers=[couple], nesting=nesting, **options)
    couple.check_any(type(elbo).__name__)
    return particles, couple


def pair_surrogate(
    f: Float[Tensor, "K B"], score: SiteScore, couple: Couple, *, last: int | None = None
) -> Float[Tensor, ""]:
    """Sum the pair formula over the elements of a site.

    Args:
        f: of each particle; of the `last` ones, if only these are compared.
        score: of the site.
        couple: has drawn the values.
        last: number of the particles that the coupling has drawn together; None: all.
    """
    number = len(f)
    skipped = 0 if last is None else len(score.log_prob) - last
    drawn = couple.drawn.get(score.name)
    if drawn is None:
        return leave_one_out_surrogate(f, score.log_prob[skipped:])
    log_q = element_log_probs(score)[skipped:]  # [K, B, D]
    surrogate = leave_one_out_surrogate(f, log_q.sum(-1))
    coupling = couple.coupling
    assert isinstance(coupling, PairCoupling)
    for k, other in coupling.pairs(number):
        contrast = coupling.contrast(score, drawn, log_q, k, other)  # [B, D]
        beyond = (contrast - (log_q[k] - log_q[other])).sum(-1)
        surrogate = surrogate + (finite(f[k] - f[other]) * beyond).sum() / (number * (number - 1))
    return surrogate


def leave_one_out_surrogate(f: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]) -> Float[Tensor, ""]:
    """Compare each particle with the mean of the others: the pair formula with W = 1."""
    others = leave_one_out_sum(f) / (len(f) - 1)
    return (finite(f - others) * log_q).mean(0).sum()
