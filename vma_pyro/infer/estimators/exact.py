"""The bound with discrete sites summed exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimate, PlateOptions
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import normalised, weighted
from vma_pyro.infer.estimators.subset import SubsetELBO


class ExactELBO(SubsetELBO):
    r"""The bound with one or more discrete sites summed inside the logarithm, and particles on the rest only.

    .. math::
        L = \log \frac1K \sum_k \sum_a \frac{p(x, z_{ka}, a)}{q(z_{ka} \mid x, a)}

    (stratified importance weighting over a, Morningstar et al. 2021.) It takes |support| runs of the model for
    each particle, and is unbiased without any score. q(a|x) is not in it and learns nothing from it, unless a is
    masked or scaled: pair it with another estimator of the guide's gradient, or use it to judge one. A site of
    several elements (`to_event`) has all their joint values, up to 4,096.

    Args:
        num_particles: K, draws of the reparameterised sites for each value.
        site: name of the discrete site, or a sequence of names, in the order in which the guide draws them.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`. With "common" noise all
            values of the site meet the same noise.

    Raises:
        ValueError: another site that is not reparameterised; no such site; no finite support.
    """

    objective = "exact"
    unbiased = True

    def __init__(
        self, num_particles: int = 1, *, site: str | Sequence[str] = "address", **plates: Unpack[PlateOptions]
    ) -> None:
        super().__init__(num_particles, **plates)
        self.sites = (site,) if isinstance(site, str) else tuple(site)

    def _estimate(self, programs: Programs) -> Estimate:
        values = dict.fromkeys(self.sites, whole_support)
        particles = self._draw_values(programs, values, self.num_particles)
        log_w = particles.log_weights.flatten(0, -2)  # [S..., K, B] to [S...K, B]
        bound = log_w.logsumexp(0) - math.log(self.num_particles)
        surrogate = weighted(normalised(log_w), log_w).sum()
        return Estimate(bound.detach(), surrogate, particles.scale)
