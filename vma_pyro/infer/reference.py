"""Reference gradients: the discrete sites summed exactly where that can be done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.util import prune_subsample_sites

from vma_pyro.infer.checks import is_reparameterised
from vma_pyro.infer.estimator import Estimate, Estimator
from vma_pyro.infer.handlers import ChooseValues, whole_support
from vma_pyro.infer.log_weights import run
from vma_pyro.infer.plates import Program, is_random_subsample, sample_sites

MOST_OUTCOMES = 2_000_000  # of all particles and datapoints together


class EnumeratedReference(Estimator):
    r"""The multi-sample bound, or the single-sample one, with all discrete sites of the guide summed exactly.

    .. math::
        \sum_{a_1 \dots a_K} \prod_k q(a_k) \, \log \frac1K \sum_k w_k
        \qquad\text{or}\qquad \sum_a q(a) \log w

    with one draw of the reparameterised sites for each value and particle. Without reparameterised sites it is
    exact: every draw is the same. The cost is |support|^K sums and K |support| runs of the model.

    Args:
        num_particles: K.
        sites: names of the guide's discrete sites, in the order in which it draws them; see `guide_sites`.
        single_sample: the single-sample bound, averaged over K draws of the reparameterised sites.
        batch_plates, max_plate_nesting: see `Estimator`.
    """

    objective = "iwae"
    unbiased = True

    def __init__(
        self, num_particles: int = 2, *, sites: Sequence[str], single_sample: bool = False, **plates: Any
    ) -> None:
        super().__init__(num_particles, **plates)
        self.sites, self.single_sample = tuple(sites), single_sample
        self.objective = "elbo" if single_sample else "iwae"

    def _estimate(self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> Estimate:
        nesting = self._nesting(model, guide, args, kwargs)
        given = [ChooseValues(name, whole_support, nesting + 1 + i) for i, name in enumerate(self.sites)]
        particles = self._draw(model, guide, args, kwargs, self.num_particles, given=given, pathwise=None)
        shape = particles.log_weights.shape[-2:]
        log_q = particles.given.reshape(-1, *shape)  # [O, K, B], all joint values of the sites
        # A value of probability zero counts nothing, whatever it weighs.
        log_w = torch.where(log_q > -math.inf, particles.log_weights.reshape(-1, *shape) - log_q, 0.0)
        single = (log_q.exp() * log_w).sum(0).mean(0)
        value = single if self.single_sample else self._over_outcomes(log_w, log_q)
        return Estimate(value.detach(), value.sum(), particles.scale)

    def _over_outcomes(self, log_w: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Sum over the joint values of all particles [B], one particle after the other."""
        total, probability = log_w[:, 0], log_q[:, 0]  # [O, B]: log sum of weights, log probability
        for k in range(1, self.num_particles):
            total = torch.logaddexp(total[:, None], log_w[None, :, k]).flatten(0, 1)
            probability = (probability[:, None] + log_q[None, :, k]).flatten(0, 1)
        return (probability.exp() * (total - math.log(self.num_particles))).sum(0)


class DiscreteSite(NamedTuple):
    """One discrete site of a guide: its name, and the size of its support (None: not to be enumerated)."""

    name: str
    size: int | None


class GuideSites(NamedTuple):
    """The latent sites of a guide, in the order in which it draws them.

    Attributes:
        discrete: those that are not reparameterised.
        is_random_otherwise: whether there are others, or randomly subsampled plates; if not, enumeration is exact.
    """

    discrete: tuple[DiscreteSite, ...]
    is_random_otherwise: bool

    def can_be_enumerated(self, num_particles: int, datapoints: int) -> bool:
        """Whether `EnumeratedReference` is affordable."""
        if not self.discrete or any(site.size is None for site in self.discrete):
            return False
        joint = math.prod(site.size or 1 for site in self.discrete)
        return joint**num_particles * datapoints <= MOST_OUTCOMES


def guide_sites(
    guide: Program, args: Sequence[Any], kwargs: dict[str, Any], batch_plates: Sequence[str] = ("data",)
) -> GuideSites:
    """Run the guide once, and look at its latent sites."""
    with torch.no_grad():
        trace = run(guide, args, kwargs)
        others = any(is_random_subsample(site) for site in trace.nodes.values())
        trace = prune_subsample_sites(trace)
        trace.compute_score_parts()
    discrete = []
    for site in sample_sites(trace):
        if site["is_observed"]:
            continue
        if is_reparameterised(site):
            others = True
            continue
        finite = getattr(site["fn"], "has_enumerate_support", False)
        # In a plate of its own a site has many values per datapoint, which are not enumerated.
        alone = all(f.name in batch_plates for f in site["cond_indep_stack"] if f.vectorized)
        size = len(whole_support(site["fn"])) if finite and alone else None
        discrete.append(DiscreteSite(site["name"], size))
    return GuideSites(tuple(discrete), others)
