"""The multi-sample bound over distinct values."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.checks import check_batch_plates_only, is_function_of
from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimate, PlateOptions
from vma_pyro.infer.engine.handlers import check_finite_support, is_drawn, is_open
from vma_pyro.infer.engine.plates import Layout
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import normalised, weighted
from vma_pyro.infer.estimators.subset import DistinctDraw, SubsetELBO, log_q_and_f


class DistinctELBO(SubsetELBO):
    r"""A multi-sample bound over k distinct values of a discrete site: the k - 1 most probable, and one other.

    .. math::
        L = \log \Big[ \sum_{s \in C} w_s q_s + (1 - q_C) \, w_{s'} \Big], \qquad
        w_s q_s = \frac{p(x, z_s, s)}{q(z_s \mid s)}, \qquad s' \sim q \text{ outside } C

    The bracket is an unbiased estimate of p(x), so L is a bound; no run of the model is spent on a repeated value,
    and at k = |support| it is `ExactELBO` (if q rules out no value that p allows). The score part is that of s'
    alone, with the bound without s' as baseline. A site whose q(s) depends on a continuous latent is refused: C
    changes with the latent, which adds a part to the gradient that is not estimated.

    The bound depends on q(s) only through the choice of values, so its gradient trains the guide little. With
    `guide_follows="posterior"` the score part is that of wake-phi (Bornschein & Bengio 2015) on the same runs
    of the model: the sum over s of (v_s - q_s-share) grad log q_s, with v the values' shares of the bracket. That
    is biased, and has little noise.

    Args:
        num_particles: k, at least 2; at most the size of the support.
        site: name of the discrete site.
        guide_follows: what q(s) learns from: the "bound" (default), or the "posterior".
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    objective = "distinct"
    unbiased = True
    min_particles = 2

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str = "address",
        guide_follows: str = "bound",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, site=site, **plates)
        if guide_follows not in ("bound", "posterior"):
            raise ValueError(f"guide_follows: expected 'bound' or 'posterior', got {guide_follows!r}")
        self.guide_follows = guide_follows
        self.unbiased = guide_follows == "bound"

    def _estimate(self, programs: Programs) -> Estimate:
        draw = DistinctDraw(self.site, self.num_particles)
        alone = (
            [DependsOnNothing(self.site, Layout(self.batch_plates, 0), "DistinctELBO")]
            if torch.is_grad_enabled()
            else []
        )
        particles = self._draw_values(programs, {self.site: draw.top_and_one}, handlers=alone)
        joint = particles.log_weights[:, 0]  # [k, B]
        log_q, _ = log_q_and_f(particles)
        log_outside = particles.at_datapoints(draw.log_outside)
        something_left = log_outside > -math.inf
        log_outside = torch.where(something_left, log_outside, 0.0)
        with torch.no_grad():
            # log 1 / q(s' | outside C) = log(1 - q_C) - log q(s'), and 0 inside C, whose values are certain.
            # Where q has nothing outside C, s' cannot be drawn and counts nothing.
            log_ratio = torch.zeros_like(log_q)
            possible = (particles.log_q_enumerated[-1, 0] > -math.inf) & something_left
            log_ratio[-1] = torch.where(possible, log_outside - log_q[-1], -math.inf)
            terms = joint + log_ratio
            live = particles.live[0, 0]
            bound = torch.where(live, terms.logsumexp(0), 0.0)
            v = torch.where(live, normalised(terms), 0.0)
        surrogate = weighted(v, joint).sum()
        if self.guide_follows == "posterior":
            shares = torch.where(live, (particles.log_q_enumerated[:, 0].detach() + log_ratio).exp(), 0.0)
            surrogate = surrogate + ((v - shares) * log_q).sum()
        else:
            surrogate = surrogate + self._score_part(terms, log_q[-1] - log_outside, bound, v[-1], live)
        return Estimate(bound, surrogate, particles.scale)

    @staticmethod
    def _score_part(terms: Tensor, log_q: Tensor, bound: Tensor, v: Tensor, live: Tensor) -> Float[Tensor, ""]:
        """Compute the score part of s', of log probability log_q outside C; in it L has the derivative -v."""
        without = terms[:-1].logsumexp(0)
        coefficient = bound - torch.where(without == -math.inf, 0.0, without) - v
        coefficient = torch.where(live & (bound > -math.inf), coefficient, 0.0)
        return (coefficient * log_q).sum()


class DependsOnNothing(Messenger):
    """Refuse a site whose distribution depends on a continuous latent drawn before it."""

    def __init__(self, site: str, layout: Layout, what: str) -> None:
        self.site, self.layout, self.what = site, layout, what
        self.before: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.site or not is_open(msg) or not self.before:
            return
        check_batch_plates_only(msg, self.layout)  # which the objectives named below refuse as well
        check_finite_support(msg, " to choose values from")
        log_probs = msg["fn"].log_prob(whole_support(msg["fn"]))
        for name, value in self.before.items():
            if is_function_of(log_probs, value):
                raise ValueError(
                    f"site '{self.site}': expected to depend on no continuous latent under {self.what}, but the "
                    f"choice of its values changes with '{name}', and there the gradient has a part that is not "
                    "estimated; use ExactELBO, UnorderedSetELBO or SumAndSampleELBO"
                )

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_drawn(msg) and msg["name"] != self.site and msg["value"].is_floating_point():
            if not msg["value"].requires_grad:  # with parameters of its own or without
                msg["value"] = msg["value"].detach().requires_grad_()
            self.before[msg["name"]] = msg["value"]
