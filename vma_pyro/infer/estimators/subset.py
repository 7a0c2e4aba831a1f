"""The base of objectives that take all values of a discrete site or some distinct ones, and the draw of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimator, PlateOptions
from vma_pyro.infer.engine.handlers import EnumerateValues, Values
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Handler, Programs


class SubsetELBO(Estimator):
    """An objective that takes all or some values of one discrete site, instead of drawing them one by one.

    All other sites of the guide must be reparameterised. The site's values stand in a dimension of their own, left
    of the particles: everything that depends on them gets it, as under Pyro's parallel enumeration. A site of
    several elements (`to_event`) has all their joint values, up to 4,096.

    Args:
        num_particles: K, or the number of values.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    most_particles = math.inf

    def __init__(
        self, num_particles: int = 2, *, site: str | Sequence[str] = "address", **plates: Unpack[PlateOptions]
    ) -> None:
        super().__init__(num_particles, **plates)
        names = (site,) if isinstance(site, str) else tuple(site)
        if len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"site: expected one name for {type(self).__name__}, got {site!r}")
        if num_particles > self.most_particles:
            raise ValueError(
                f"num_particles: expected at most {self.most_particles} values in a set, got {num_particles}"
            )
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        self.site = names[0]

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


class DistinctDraw:
    """Draws distinct values of one site, and remembers the probability of those that were not drawn."""

    def __init__(self, site: str, k: int) -> None:
        self.site, self.k = site, k

    def without_replacement(self, fn: Any) -> Tensor:
        """Draw k values one after the other, [k, *batch, *event]."""
        with torch.no_grad():
            log_probs = self._log_probs(fn)
            values = draw_distinct(log_probs, self.k)
            self.log_rest = left_over(log_probs, values)
        return values_at(fn, values)

    def top_and_one(self, fn: Any) -> Tensor:
        """Take the k - 1 most probable values, and draw one from the others, [k, *batch, *event]."""
        log_probs = self._log_probs(fn)
        with torch.no_grad():
            top = log_probs.topk(self.k - 1, dim=-1).indices.movedim(-1, 0)
            outside = torch.zeros_like(log_probs).scatter(-1, top.movedim(0, -1), -torch.inf)
            one = draw_distinct(log_probs + outside, 1)
            values = torch.cat([top, one])
        # Where nothing is left, -inf without a gradient: that of logsumexp would be NaN.
        rest = log_probs + outside
        nothing = (rest == -torch.inf).all(-1)
        sums = torch.where(nothing[..., None], 0.0, rest).logsumexp(-1)
        self.log_outside = torch.where(nothing, -torch.inf, sums)  # differentiable
        return values_at(fn, values)

    def _log_probs(self, fn: Any) -> Float[Tensor, "*B S"]:
        """Compute log q of the whole support, normalised."""
        support = whole_support(fn)
        if len(support) < self.k:
            raise ValueError(
                f"num_particles: expected at most the {len(support)} values of site '{self.site}', got {self.k}"
            )
        log_probs = fn.log_prob(support).movedim(0, -1)
        return log_probs.expand(*fn.batch_shape, len(support)).log_softmax(-1)


def values_at(fn: Any, index: Tensor) -> Tensor:
    """Look up the values of the support at positions [k, *batch]."""
    support = whole_support(fn)
    return support.reshape(len(support), *fn.event_shape)[index]


def draw_distinct(log_probs: Float[Tensor, "*B S"], k: int) -> Int[Tensor, " k *B"]:
    """Draw k distinct values by the Gumbel top-k trick (Kool et al. 2019), and keep their order."""
    gumbel = -torch.empty_like(log_probs).exponential_().log()
    return (log_probs + gumbel).topk(k, dim=-1).indices.movedim(-1, 0)


def left_over(log_probs: Float[Tensor, "*B S"], values: Int[Tensor, " k *B"]) -> Float[Tensor, " *B"]:
    """Compute the log probability outside a set, without cancellation."""
    taken = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, values.movedim(0, -1), True)
    return log_probs.masked_fill(taken, -torch.inf).logsumexp(-1)
