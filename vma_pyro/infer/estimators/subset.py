"""The base of objectives that take all values of a discrete site, or some distinct ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro.infer.engine.enumeration import EnumerateValues, Values
from vma_pyro.infer.engine.estimator import Estimator, PlateOptions
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Handler, Programs


class SubsetELBO(Estimator):
    """An objective that takes all or some values of one discrete site, instead of drawing them one by one.

    All other sites of the guide must be reparameterised. The site's values stand in a dimension of their own, left
    of the particles: everything that depends on them gets it, as under Pyro's parallel enumeration.

    Args:
        num_particles: K, or the number of values.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    most_particles = math.inf

    def __init__(self, num_particles: int = 2, *, site: str = "address", **plates: Unpack[PlateOptions]) -> None:
        super().__init__(num_particles, **plates)
        if num_particles > self.most_particles:
            raise ValueError(
                f"num_particles: expected at most {self.most_particles} values in a set, got {num_particles}"
            )
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        self.site = site

    def _draw_values(
        self,
        programs: Programs,
        values: Mapping[str, Values],
        num_particles: int = 1,
        handlers: Sequence[Handler] = (),
    ) -> Particles:
        """Draw particles with log q(values) w, [*S, K, B]; refuse other sites that are not reparameterised."""
        nesting = self._nesting(programs)
        enumerated = [
            EnumerateValues(name, of_site, nesting + 1 + position)
            for position, (name, of_site) in enumerate(values.items())
        ]
        particles = self._draw(programs, num_particles, enumerated=enumerated, handlers=handlers)
        for score in particles.scores:
            raise ValueError(
                f"site '{score.name}': expected a reparameterised site beside {sorted(values)}, "
                f"got one that is not; {type(self).__name__} chooses the values of {sorted(values)} only"
            )
        return particles


def log_q_and_f(particles: Particles) -> tuple[Float[Tensor, "k B"], Float[Tensor, "k B"]]:
    """Compute log q of the values and log w, [k, B]; both are 0 for a value of probability zero."""
    log_q, joint = particles.log_q_enumerated[:, 0], particles.log_weights[:, 0]
    possible = log_q > -math.inf
    log_q = torch.where(possible, log_q, 0.0)
    return log_q, torch.where(possible, joint - log_q, 0.0)
