"""The thermodynamic variational objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch

from vma_pyro.infer.engine.estimator import Estimate, Estimator, RunOptions
from vma_pyro.infer.engine.handlers import DetachValues
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite, normalised


class ThermodynamicELBO(Estimator):
    r"""A left Riemann sum along the path from q to the posterior.

    .. math::
        \log p(x) = \int_0^1 E_{\pi_\beta}[\log w] \, d\beta \ge
        \sum_j (\beta_{j+1} - \beta_j) E_{\pi_{\beta_j}}[\log w], \qquad
        \pi_\beta \propto p(x, h)^\beta q(h)^{1 - \beta}

    (Masrani et al. 2019, equations 5 and 6.) Expectations are self-normalised importance averages with weights
    w^beta, and the gradient of each is E[grad log w] + Cov[grad log (p^beta q^(1-beta)), log w] (equation 9), with
    all sampled values held fixed: discrete and continuous sites are treated alike. The averages are ratios, and so
    biased. Scales and masks of single sites enter the path: q is taken to the power with which it stands in w.

    Args:
        num_particles: K, at least 2.
        betas: beta_0 = 0 < beta_1 < ...; the last interval ends at 1.
        batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: betas that do not rise from 0 to below 1.
    """

    objective = "tvo"
    unbiased = False
    min_particles = 2
    _couples = False  # no gradient passes through the noise
    _differentiates_draws = False

    def __init__(
        self, num_particles: int = 4, *, betas: Sequence[float] = (0.0, 0.1, 0.3), **options: Unpack[RunOptions]
    ) -> None:
        super().__init__(num_particles, **options)
        ends = [*betas[1:], 1.0]
        if not betas or betas[0] != 0 or any(a >= b for a, b in zip(betas, ends, strict=True)):
            raise ValueError(f"betas: expected numbers that rise from 0 and stay below 1, got {list(betas)}")
        self.betas = tuple(betas)

    def _estimate(self, programs: Programs) -> Estimate:
        particles = self._draw(programs, self.num_particles, handlers=[DetachValues()])
        log_w, log_p, log_q = particles.log_weights, particles.log_p, particles.log_q  # [K, B]
        f = log_w.detach()  # -inf where the model says impossible: the objective is then -inf
        log_w, log_p, known = finite(log_w), finite(log_p), finite(f)
        value = torch.zeros_like(f[0])
        surrogate = torch.zeros_like(f[0, 0])
        for beta, end in zip(self.betas, [*self.betas[1:], 1.0], strict=True):
            weights = normalised(beta * f) if beta > 0 else torch.full_like(f, 1 / len(f))
            mean = (weights * known).sum(0)
            covariance = (weights * (known - mean) * (beta * log_p + (1 - beta) * log_q)).sum()
            surrogate = surrogate + (end - beta) * ((weights * log_w).sum() + covariance)
            value = value + (end - beta) * torch.where(weights > 0, weights * f, 0.0).sum(0)
        return Estimate(value, surrogate, particles.scale)
