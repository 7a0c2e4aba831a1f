"""Measure-valued derivatives: the gradient for each discrete element from the program at all of its values."""

from __future__ import annotations

from typing import Unpack, final

import torch

from vma_pyro.infer.engine.changed import Changes
from vma_pyro.infer.engine.estimator import Estimate, Estimator, PlateOptions
from vma_pyro.infer.engine.plates import Layout
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite


@final
class MeasureValued(Estimator):
    r"""The evidence lower bound; the gradient for each discrete element sums over its own values.

    .. math::
        \nabla_\phi = \frac1K \sum_k \sum_d \sum_s f(s, a_{k,-d}) \, \nabla_\phi \, q_d(s)
                      + \text{(the gradient of f itself)}

    that is the measure-valued derivative of every factor q_d in turn (Pflug 1996; Mohamed et al. 2020, section 6).
    For a normalised q_d it is the local expectation gradient, too (Titsias & Lazaro-Gredilla 2015): the form
    q_ds (f(s) - f(a)) for the logit s differs by f(a) times the derivative of a sum that is one.

    Elements are those of vectors, of plates inside the datapoint, and of all discrete sites; what the guide draws
    after the changed element is drawn anew. There is no noise of the element itself; with one element in all it is
    the sum over its values. It takes 1 + the sum over elements of (values - 1) runs of model and guide for each
    of K. Value and gradient of f are averages over all runs, weighted by q of the values.

    Args:
        num_particles: K, draws around each of which all elements are changed.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`. "common" lets all runs share the
            noise of reparameterised sites.

    Raises:
        ValueError: a discrete site without finite support; none at all.
    """

    objective = "elbo"
    unbiased = True
    _knows_rules = True

    def __init__(self, num_particles: int = 1, **plates: Unpack[PlateOptions]) -> None:
        super().__init__(num_particles, **plates)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")

    def _all_particles(self) -> int:
        return 2 * self.num_particles  # or more: all are in the particle plate

    def _estimate(self, programs: Programs) -> Estimate:
        nesting = self._nesting(programs)
        changes = Changes(programs, Layout(self.batch_plates, nesting), self.num_particles)
        particles = self._draw(programs, changes.particles, handlers=[changes], nesting=nesting)
        log_w, K = particles.log_weights, self.num_particles
        scores = {score.name: score for score in particles.scores}
        for name in sorted(set(scores) ^ {site.name for site in changes.sites}):
            raise ValueError(
                f"site '{name}': expected in every run of the guide, as values are changed in it, found in some"
            )
        f, live = (t.unflatten(0, (-1, K)) for t in (log_w.detach(), particles.live))  # [R, K, B]
        live = live[0]
        weights, surrogate = torch.zeros_like(f), torch.zeros_like(f[0, 0, 0])
        for site in changes.sites:
            log_q, drawn = site.table(scores[site.name], K)  # [S, K, B, D], [K, B, D]
            q = torch.where(live[..., None], log_q.detach().exp(), 0.0)
            runs = site.runs_at(drawn)
            # Compared with the run that changes nothing: the derivatives of q_d sum to zero.
            gain = torch.where(q == 0, 0.0, finite(f[runs] - f[0][..., None]))
            surrogate = surrogate + (q * gain * finite(log_q)).sum()
            weights.index_put_(runs, q / changes.elements, accumulate=True)
        weights[0].masked_fill_(~live, 1.0)  # of a datapoint that is masked entirely, whose value is zero
        weights = weights.flatten(0, 1)  # [R K, B]
        particles.open_gates(torch.ones_like(weights))  # every run has a bound of its own: dreg is stl
        # The score, whose mean is zero, takes the derivative of -log q(a) out of log w.
        surrogate = surrogate + (weights * (finite(log_w) + finite(particles.score))).sum()
        value = torch.where(weights == 0, 0.0, weights * log_w.detach()).sum(0) / K
        return Estimate(value, surrogate / K, particles.scale)
