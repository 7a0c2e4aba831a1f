"""Estimators that choose the values of one discrete site: all of them, or some distinct ones.

All other sites of the guide must be reparameterised. The site's values stand in a dimension of their own, left of
the particles: everything that depends on them gets it, as under Pyro's parallel enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.infer.engine.checks import is_function_of
from vma_pyro.infer.engine.estimator import Estimate, Estimator, Noise, PlateOptions, finite, normalised, weighted
from vma_pyro.infer.engine.handlers import Chooser, ChooseValues, is_drawn, is_open, whole_support
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.estimators.subsets import MOST_VALUES, SetRatios, draw_distinct, left_over


class ChosenSiteELBO(Estimator):
    """Common ground of the estimators below; not one itself."""

    def __init__(
        self,
        num_particles: int = 1,
        *,
        site: str = "address",
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, noise=noise, **plates)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        self.site = site

    def _draw_given(
        self,
        programs: Programs,
        choosers: Mapping[str, Chooser],
        num_particles: int = 1,
        handlers: Sequence[Handler] = (),
    ) -> Particles:
        """Particles with log q(values) w, [*S, K, B]; refuses other sites that are not reparameterised."""
        nesting = self._nesting(programs)
        given = [
            ChooseValues(name, choose, nesting + 1 + position)
            for position, (name, choose) in enumerate(choosers.items())
        ]
        particles = self._draw(programs, num_particles, given=given, handlers=handlers)
        for score in particles.scores:
            raise ValueError(
                f"site '{score.name}': expected a reparameterised site beside {sorted(choosers)}, "
                f"got one that is not; {type(self).__name__} chooses the values of {sorted(choosers)} only"
            )
        return particles


class ExactELBO(ChosenSiteELBO):
    r"""The bound with one or more discrete sites summed inside the logarithm, and particles on the rest only.

    .. math::
        L = \log \frac1K \sum_k \sum_a \frac{p(x, z_{ka}, a)}{q(z_{ka} \mid x, a)}

    (stratified importance weighting over a, Morningstar et al. 2021.) |support| runs of the model for each of the
    K particles; unbiased without any score. q(a|x) is not in it, and learns nothing from it, unless a is masked or
    scaled: pair it with another estimator of the guide's gradient, or use it to judge one.

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
        self,
        num_particles: int = 1,
        *,
        site: str | Sequence[str] = "address",
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, noise=noise, **plates)
        self.sites = (site,) if isinstance(site, str) else tuple(site)

    def _estimate(self, programs: Programs) -> Estimate:
        choosers = dict.fromkeys(self.sites, whole_support)
        particles = self._draw_given(programs, choosers, self.num_particles)
        log_w = particles.log_weights.flatten(0, -2)  # [S..., K, B] to [S...K, B]
        bound = log_w.logsumexp(0) - math.log(self.num_particles)
        surrogate = weighted(normalised(log_w), log_w).sum()
        return Estimate(bound.detach(), surrogate, particles.scale)


class UnorderedSetELBO(ChosenSiteELBO):
    r"""The evidence lower bound from k distinct values of a discrete site.

    .. math::
        L = \sum_{s \in U} q_s R(U, s) f(s), \qquad f(s) = \log \frac{p(x, z_s, s)}{q(s) \, q(z_s \mid s)}, \qquad
        \nabla = \sum_{s \in U} q_s R(U, s) \big[ (f(s) - b(s)) \nabla \log q_s + \nabla_{\theta, z} f(s) \big]

    where U is drawn without replacement, R are its leave-one-out ratios, and b(s) is the estimate of E f from the
    rest of U (Kool et al. 2020, equations 9 and 12). No run of the model is spent on a repeated value; at
    k = |support| it is exact.

    Args:
        num_particles: k, from 2 to 12; at most the size of the support.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str = "address",
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, site=site, noise=noise, **plates)
        if num_particles > MOST_VALUES:
            raise ValueError(f"num_particles: expected at most {MOST_VALUES} values in a set, got {num_particles}")

    def _estimate(self, programs: Programs) -> Estimate:
        draw = _Draw(self.site, self.num_particles)
        particles = self._draw_given(programs, {self.site: draw.without_replacement})
        given, f = _log_q_and_f(particles)  # [k, B]
        ratios = SetRatios(
            in_double(particles.given[:, 0].detach()), in_double(particles.at_datapoints(draw.log_rest))
        )
        weights = ratios.log_weights().exp()
        signal = in_double(f.detach()) - ratios.expectation_given_first(in_double(f.detach()))
        live = particles.live[:, 0]
        weights, signal = (torch.where(live, t.to(f), 0.0) for t in (weights, signal))
        # The 1 cancels the derivative of -log q(s) inside f.
        surrogate = (weights * (finite(f) + (finite(signal) + 1) * given)).sum()
        return Estimate((weights * f.detach()).nan_to_num(neginf=-math.inf).sum(0), surrogate, particles.scale)


class SumAndSampleELBO(ChosenSiteELBO):
    r"""The evidence lower bound with the k - 1 most probable values summed, and one of the others drawn.

    .. math::
        L = \sum_{s \in C} q_s f(s) + (1 - q_C) f(s'), \qquad s' \sim q \text{ outside } C

    (Liu et al. 2019, equation 6; Rao-Blackwellised REINFORCE.) Its gradient differentiates q_s in the sum, and
    has the score of s' for the rest. At k = |support| it is exact.

    Args:
        num_particles: k, at least 2; at most the size of the support.
        site: name of the discrete site.
        noise, batch_plates, max_plate_nesting, retain_graph: see `Estimator`.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2

    def _estimate(self, programs: Programs) -> Estimate:
        draw = _Draw(self.site, self.num_particles)
        particles = self._draw_given(programs, {self.site: draw.top_and_one})
        given, f = _log_q_and_f(particles)  # [k, B]
        with torch.no_grad():
            log_weights = particles.given[:, 0].clone()
            log_weights[-1] = particles.at_datapoints(draw.log_outside)  # one value stands for all outside the top
            weights = torch.where(particles.live[:, 0], log_weights.exp(), 0.0)
            # What every value's f is compared with: the mean over the top, which does not depend on the sample.
            baseline = (log_weights[:-1].softmax(0) * f[:-1]).sum(0)
        # The 1 cancels the derivative of -log q(s) inside f.
        signal = finite(f.detach() - baseline)
        surrogate = (weights * (finite(f) + (signal + 1) * given)).sum()
        return Estimate((weights * f.detach()).nan_to_num(neginf=-math.inf).sum(0), surrogate, particles.scale)


class DistinctELBO(ChosenSiteELBO):
    r"""A multi-sample bound over k distinct values of a discrete site: the k - 1 most probable, and one other.

    .. math::
        L = \log \Big[ \sum_{s \in C} w_s q_s + (1 - q_C) \, w_{s'} \Big], \qquad
        w_s q_s = \frac{p(x, z_s, s)}{q(z_s \mid s)}, \qquad s' \sim q \text{ outside } C

    The bracket is an unbiased estimate of p(x), so L is a bound; no run of the model is spent on a repeated
    value, and at k = |support| it is `ExactELBO`. The score part is that of s' alone, with the bound without s'
    as baseline. C is held fixed in the gradient: where q(s) depends on a continuous latent, C changes with it, and
    the gradient has a part on the boundary that is not estimated. Such a site is refused.

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
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, site=site, noise=noise, **plates)
        if guide_follows not in ("bound", "posterior"):
            raise ValueError(f"guide_follows: expected 'bound' or 'posterior', got {guide_follows!r}")
        self.guide_follows = guide_follows
        self.unbiased = guide_follows == "bound"

    def _estimate(self, programs: Programs) -> Estimate:
        draw = _Draw(self.site, self.num_particles)
        alone = [_DependsOnNothing(self.site)] if torch.is_grad_enabled() else []
        particles = self._draw_given(programs, {self.site: draw.top_and_one}, handlers=alone)
        joint = particles.log_weights[:, 0]  # [k, B]
        given, _ = _log_q_and_f(particles)
        log_outside = particles.at_datapoints(draw.log_outside_differentiable)
        something_left = log_outside > -math.inf
        log_outside = torch.where(something_left, log_outside, 0.0)
        with torch.no_grad():
            # log 1 / q(s' | outside C) = log(1 - q_C) - log q(s'), and 0 inside C, whose values are certain.
            # Where q has nothing outside C, s' cannot be drawn and counts nothing.
            log_ratio = torch.zeros_like(given)
            possible = (particles.given[-1, 0] > -math.inf) & something_left
            log_ratio[-1] = torch.where(possible, log_outside - given[-1], -math.inf)
            terms = joint + log_ratio
            live = particles.live[0, 0]
            bound = torch.where(live, terms.logsumexp(0), 0.0)
            v = torch.where(live, normalised(terms), 0.0)
        surrogate = weighted(v, joint).sum()
        if self.guide_follows == "posterior":
            shares = torch.where(live, (particles.given[:, 0].detach() + log_ratio).exp(), 0.0)
            surrogate = surrogate + ((v - shares) * given).sum()
        else:
            surrogate = surrogate + self._score_part(terms, given[-1] - log_outside, bound, v, live)
        return Estimate(bound, surrogate, particles.scale)

    @staticmethod
    def _score_part(
        terms: Float[Tensor, "k B"],
        log_q: Float[Tensor, " B"],
        bound: Float[Tensor, " B"],
        v: Float[Tensor, "k B"],
        live: Tensor,
    ) -> Tensor:
        """Of s', whose log probability outside C is log_q; -v is its derivative inside the bracket."""
        without = terms[:-1].logsumexp(0)
        coefficient = bound - torch.where(without == -math.inf, 0.0, without) - v[-1]
        coefficient = torch.where(live & (bound > -math.inf), coefficient, 0.0)
        return (coefficient * log_q).sum()


def _log_q_and_f(particles: Particles) -> tuple[Float[Tensor, "k B"], Float[Tensor, "k B"]]:
    """log q of the values and log w, [k, B]; both 0 for a value of probability zero, which counts nothing."""
    log_q, joint = particles.given[:, 0], particles.log_weights[:, 0]
    possible = log_q > -math.inf
    log_q = torch.where(possible, log_q, 0.0)
    return log_q, torch.where(possible, joint - log_q, 0.0)


class _DependsOnNothing(Messenger):
    """Refuses a site whose distribution depends on a continuous latent drawn before it."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.before: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.site or not is_open(msg) or not self.before:
            return
        log_probs = msg["fn"].log_prob(whole_support(msg["fn"]))
        for name, value in self.before.items():
            if is_function_of(log_probs, value):
                raise ValueError(
                    f"site '{self.site}': expected to depend on no continuous latent under DistinctELBO, but its "
                    f"most probable values change with '{name}', and there the gradient has a part that is not "
                    "estimated; use ExactELBO, UnorderedSetELBO or SumAndSampleELBO"
                )

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_drawn(msg) and msg["name"] != self.site and msg["value"].is_floating_point():
            if not msg["value"].requires_grad:  # with parameters of its own or without
                msg["value"] = msg["value"].detach().requires_grad_()
            self.before[msg["name"]] = msg["value"]


class _Draw:
    """Distinct values of one site, and what the estimators need to know of those that were not drawn."""

    def __init__(self, site: str, k: int) -> None:
        self.site, self.k = site, k

    def without_replacement(self, fn: Any) -> Tensor:
        """k values drawn one after the other, [k, *batch, *event]."""
        with torch.no_grad():
            log_probs = self._log_probs(fn)
            values = draw_distinct(log_probs, self.k)
            self.log_rest = left_over(log_probs, values)
        return _at(fn, values)

    def top_and_one(self, fn: Any) -> Tensor:
        """The k - 1 most probable values, and one drawn from the others, [k, *batch, *event]."""
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
        self.log_outside_differentiable = torch.where(nothing, -torch.inf, sums)
        self.log_outside = self.log_outside_differentiable.detach()
        return _at(fn, values)

    def _log_probs(self, fn: Any) -> Float[Tensor, "*B S"]:
        """log q of the whole support, normalised."""
        support = whole_support(fn)
        if len(support) < self.k:
            raise ValueError(
                f"num_particles: expected at most the {len(support)} values of site '{self.site}', got {self.k}"
            )
        log_probs = fn.log_prob(support).movedim(0, -1)
        return log_probs.expand(*fn.batch_shape, len(support)).log_softmax(-1)


def _at(fn: Any, index: Tensor) -> Tensor:
    """Values of the support at positions [k, *batch]."""
    support = whole_support(fn)
    return support.reshape(len(support), *fn.event_shape)[index]
