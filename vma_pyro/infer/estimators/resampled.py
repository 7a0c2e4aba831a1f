"""The multi-sample bound with K forward passes of the model and one backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from pyro import poutine
from torch import Tensor

from vma_pyro.infer.engine.estimator import Estimate
from vma_pyro.infer.engine.log_weights import model_log_prob
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import log_mean_exp, normalised
from vma_pyro.infer.estimators.k_sample_bound import KSampleBound


@final
class ResampledELBO(KSampleBound):
    r"""The multi-sample bound; only one of the K particles, drawn by its weight, goes backward through the model.

    .. math::
        \sum_k (L - c_k) \nabla \log q(a_k) + \nabla \log w_{k^*}, \qquad
        k^* \sim \mathrm{Categorical}(v), \qquad v_k = \frac{w_k}{\sum_l w_l}

    (Burda et al. 2016, section 3, for the second term.) The model runs on all K particles without a graph, for the
    bound, the coefficients of the scores, and v; then once more, on particle k* of each datapoint. Given the
    particles, the mean over k* is the gradient of `MultiSampleELBO`; under `dreg` the weight of the path through
    z_k* is v_k* where that has v_k^2.

    A backward pass takes twice the operations of a forward pass, so that this costs K/3 + 1 full passes instead of
    K. Where few particles carry the weight, little is lost by the draw. Randomness of the model's own, such as
    dropout, would differ between its two runs.

    Args:
        num_particles, baseline, ...: those of `MultiSampleELBO`, without `chunk_size`.

    Raises:
        ValueError: as for `MultiSampleELBO`.
    """

    def _estimate(self, programs: Programs) -> Estimate:
        if not torch.is_grad_enabled():
            return self._estimate_with(programs, self._particles(programs, self._all_particles()))

        def forward_only(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return programs.model(*args, **kwargs)

        particles = self._particles(replace(programs, model=forward_only), self._all_particles())
        torch.clear_autocast_cache()  # else weights that were cast without a graph would get no gradient
        log_w = self._own(particles.log_weights).detach()  # [K, B]
        bound, v = log_mean_exp(log_w), normalised(log_w)
        self._open_gates(particles, v)
        alive = v.sum(0) > 0  # else all particles weigh nothing, and there is nothing to learn
        k = resample(torch.where(alive, v, 1.0))  # [B]
        log_p = model_log_prob(
            programs.with_subsamples(particles.subsamples), select(particles, k), particles.layout
        )
        log_q = particles.log_proposal.gather(0, k[None])
        surrogate = torch.where(alive, log_p - log_q, 0.0).sum()
        return Estimate(bound, surrogate + self._score_part(programs, particles, bound), particles.scale)


def resample(weights: Float[Tensor, "K B"]) -> Int64[Tensor, " B"]:
    """Draw one particle per datapoint, with probability proportional to its weight."""
    return torch.multinomial(weights.T, 1).squeeze(-1)


def select(particles: Particles, k: Int64[Tensor, " B"]) -> poutine.Trace:
    """Select the values of the latent sites in particle k[b] of each datapoint b, without a particle dimension."""
    layout = particles.layout
    index = k.reshape(1, *particles.batch_shape)
    selected = poutine.Trace()
    if len(k) == 1 and len(particles.draws) > 1:  # of one datapoint a particle's own trace, whatever sites it has
        return particles.draws[int(k)]
    _check_same_sites(particles)
    for name in particles.draws[0].stochastic_nodes:
        sites: list[Any] = [draw.nodes[name] for draw in particles.draws]
        values = torch.cat([_with_plates(site, layout.rank) for site in sites])  # [K, plates, event]
        event = values.dim() - layout.rank
        where = layout.spread(sites[0], index)
        where = where.reshape(*where.shape, *(1 for _ in range(event))).expand(1, *values.shape[1:])
        # As many plates as the site has: one run of all particles has theirs as well, leftmost.
        plates = min(len(sites[0]["fn"].batch_shape), layout.rank - 1)
        value = values.gather(0, where)
        value = value.reshape(value.shape[value.dim() - event - plates :])
        selected.add_node(name, **{**sites[0], "value": value})
    return selected


def _check_same_sites(particles: Particles) -> None:
    """Refuse particles without the same sites, as each of several datapoints takes its own particle."""
    first = set(particles.draws[0].stochastic_nodes)
    for draw in particles.draws[1:]:
        for name in sorted(first ^ set(draw.stochastic_nodes)):
            raise ValueError(
                f"site '{name}': expected in all particles, as each datapoint chooses one of them, found in some; "
                "use MultiSampleELBO for sites under a condition"
            )


def _with_plates(site: Any, rank: int) -> Tensor:
    """Expand a value to all dimensions [particles, plates] of its distribution."""
    event = site["value"].shape[site["value"].dim() - site["fn"].event_dim :]
    value = site["value"].expand(*site["fn"].batch_shape, *event)
    return value.reshape((1,) * (rank - len(site["fn"].batch_shape)) + value.shape)
