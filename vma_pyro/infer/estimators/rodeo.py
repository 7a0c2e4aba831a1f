"""RODEO: control variates that a Gibbs sampler of single values makes from the other particles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.baselines import leave_one_out_sum
from vma_pyro.infer.estimators.double_cv import Harden
from vma_pyro.infer.estimators.single_changes import Changes, Decisions, SteinControl, SteinSite
from vma_pyro.infer.estimators.squared_gradient import ascent_of_minus, learned
from vma_pyro.infer.estimators.straight_through import drawn


@final
class RODEO(Estimator):
    r"""The evidence lower bound with control variates from a discrete Stein operator.

    .. math::
        \nabla_\phi = \frac1K \sum_k \Big[ f_k - \tfrac1{K-1} \sum_{l \ne k}
                      \big( f_l + \alpha (A u_l)(a_l) \big) \Big] h_k + \beta (A \, U_k h)(a_k)
        \\
        (A u)(a) = \sum_d \Big[ \sum_s q_{ds} \, u(a_{d \to s}) - u(a) \Big], \qquad
        (u_k, U_k)(y) = \tfrac1{K-1} \sum_{l \ne k} H(f_l, \, g_l \cdot (y - x_l))

    (Shi et al. 2022; the 1/D of their A is here in alpha and beta.) f = log w, g its gradient with respect to the
    one-hot values x, h = x - q, and A the operator of a Gibbs sampler, which changes one of D elements: E A u = 0
    for every u. Unbiased for any alpha, beta and H, and whatever a value between the discrete ones means to the
    program. They follow the gradient of the squared gradient of the same draw. At the start alpha = beta = 0:
    `RLOO`. All changes are guessed from g: the program is run K times, and differentiated once for x.

    At D = 1, A u = E u - u, and RODEO is a critic whose expectation is summed, `CriticELBO`, made from the other
    particles. An element whose value decides the distribution of a later one, as in the first of two layers, is
    not changed, as its distribution given the others is not q; its score is compared all the same.

    The program must be able to read one-hot values [..., S] in the place of integers, see `RelaxedELBO`; bits stay
    as they are.

    Args:
        num_particles: K, at least 2.
        site: names of the sites with control variates; None: all discrete sites. `Categorical`,
            `OneHotCategorical` or `Bernoulli`; others are compared with the mean of the other particles.
        network: what H has beside :math:`(g \cdot (y - x), g \cdot (y - x))`, a module from [..., 2] to [..., 2];
            f is standardised by its running mean and deviation, and all else by the deviation. None: 16 units.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: no such site, or one of another family; a program that cannot read one-hot values.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2
    _knows_rules = True

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str | Sequence[str] | None = None,
        network: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, **options)
        if not self.vectorize_particles:
            raise ValueError("vectorize_particles: expected True for RODEO, got False")
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"network: expected an nn.Module, got {network!r}")
        self.sites = (site,) if isinstance(site, str) else None if site is None else tuple(site)
        self.control = SteinControl(network)

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return alpha, beta and H."""
        return {"control": self.control}

    def _estimate(self, programs: Programs) -> Estimate:
        if not torch.is_grad_enabled():
            plain = self._draw(programs, self.num_particles)
            return Estimate(plain.log_weights.mean(0), plain.log_weights.new_zeros(()), plain.scale)
        particles, sites = self._draw_sites(programs)
        log_w, K = particles.log_weights, self.num_particles  # [K, B]
        f = finite(log_w.detach())
        # The score, whose mean is zero, takes the derivative of -log q(a) out of log w.
        surrogate = (finite(log_w) + particles.score).mean(0).sum()
        changes = Changes.of(self.control, f, sites, particles.live)
        advantage = f - leave_one_out_sum(f + self.control.alpha.to(f) * changes.of_u) / (K - 1)
        square = torch.zeros_like(surrogate)
        for site in sites:
            gradient = finite(advantage[..., None, None] * site.h + changes.of_scores(self.control, site))
            surrogate = surrogate + (gradient.detach() * site.logits).sum() / K
            of_logits = gradient.mean(0) if site.shared else gradient / K
            square = square + of_logits.square().sum()
        names = {site.name for site in sites}
        for score in particles.scores:
            if score.name not in names:
                surrogate = surrogate + (advantage.detach() * score.log_prob).mean(0).sum()
        surrogate = surrogate + ascent_of_minus(square, learned([self.control]))
        self.control.remember(f, particles.live)
        return Estimate(log_w.detach().mean(0), surrogate, particles.scale)

    def _draw_sites(self, programs: Programs) -> tuple[Particles, list[SteinSite]]:
        """Draw particles with one-hot values, and differentiate log w with respect to them."""
        harden = Harden(self.sites, 1.0, lambda log_q, _: drawn(log_q))
        nesting = self._nesting(programs)
        decisions, hardened = Decisions(nesting), programs.under(harden)
        watched = replace(hardened, guide=decisions(hardened.guide))
        with harden.reading("RODEO"):
            particles = self._draw(watched, self.num_particles, nesting=nesting)
        for name in self.sites or ():
            if name not in harden.met:
                raise ValueError(f"site '{name}': expected a discrete site in the guide, found none")
        particles.open_gates(torch.ones_like(particles.log_weights))  # every particle has a bound of its own
        scores = [score for score in particles.scores if score.name in harden.met]
        return particles, [SteinSite.of(score, particles.log_weights, decisions) for score in scores]
