"""The base of estimators of the K-sample bound: their options, the score part and its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.infer.engine.estimator import Estimate, Estimator, RunOptions
from vma_pyro.infer.engine.handlers import ShareDiscrete
from vma_pyro.infer.engine.particles import Particles, SiteScore
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite, log_mean_exp, normalised, weighted
from vma_pyro.infer.estimators.baselines import ScoreBaseline, baseline_name, vimco
from vma_pyro.infer.estimators.learned_baseline import LearnedBaseline

# From a site's score, its coefficients L - c_k [K, B] and log q [K, B] to the surrogate of its score part.
SiteSurrogate = Callable[[SiteScore, Tensor, Tensor], Tensor]


def plain_surrogate(
    score: SiteScore, coefficient: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]
) -> Float[Tensor, ""]:
    """Sum (L - c_k) log q(a_k) over particles."""
    return (coefficient * log_q).sum()


class KSampleBound(Estimator):
    r"""The bound log 1/K sum_k w_k, with a score baseline and a pathwise rule; see `MultiSampleELBO`.

    Its subclasses say in `_estimate` how particles are drawn, and which of them gradients go through.
    """

    objective = "iwae"
    unbiased = True
    _knows_rules = True
    _knows_baselines = True

    def __init__(
        self,
        num_particles: int = 2,
        *,
        baseline: ScoreBaseline = vimco,
        pathwise: PathwiseRule = iwae,
        draws_per_score: int = 1,
        **options: Unpack[RunOptions],
    ) -> None:
        self.baseline, self.pathwise, self.draws_per_score = baseline, pathwise, draws_per_score
        self.min_particles = getattr(baseline, "min_particles", 1)
        super().__init__(num_particles, **options)
        if draws_per_score < 1:
            raise ValueError(f"draws_per_score: expected at least 1, got {draws_per_score}")
        if self.noise == "common" and pathwise.detached:
            raise ValueError(
                f"pathwise: expected iwae with common noise, as '{pathwise.name}' takes the particles for "
                f"independent, got {pathwise.name}"
            )
        single = num_particles * draws_per_score == 1
        if self.noise == "common" or draws_per_score > 1:
            self.objective = "iwae-coupled"  # a bound too, but another one
        self.unbiased = getattr(baseline, "unbiased", True) and (pathwise.unbiased or single)

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return the baseline, if it has parameters."""
        return {"baseline": self.baseline} if isinstance(self.baseline, nn.Module) else {}

    def _what(self) -> str:
        return f"baseline {baseline_name(self.baseline)!r}"

    def _all_particles(self) -> int:
        """Count all particles: K times the draws per score, and the fresh ones of the baseline."""
        return (self.num_particles + getattr(self.baseline, "fresh_particles", 0)) * self.draws_per_score

    def _particles(self, programs: Programs, number: int) -> Particles:
        """Draw so many particles under the pathwise rule; those of one score share the discrete values."""
        nesting = self._nesting(programs)
        handlers = [ShareDiscrete(self.draws_per_score, nesting)] if self.draws_per_score > 1 else []
        return self._draw(programs, number, pathwise=self.pathwise, handlers=handlers, nesting=nesting)

    def _estimate_with(
        self, programs: Programs, particles: Particles, site_surrogate: SiteSurrogate = plain_surrogate
    ) -> Estimate:
        """Estimate the bound of drawn particles, and its gradient through all of them."""
        log_w = self._own(particles.log_weights)
        bound, v = log_mean_exp(log_w).detach(), normalised(log_w)  # [B], [K, B]
        self._open_gates(particles, v)
        score_part = self._score_part(programs, particles, bound, site_surrogate)
        return Estimate(bound, weighted(v, log_w).sum() + score_part, particles.scale)

    def _own(self, values: Float[Tensor, "N B"]) -> Float[Tensor, "K B"]:
        """Leave out the fresh particles of the baseline."""
        return values[: self.num_particles * self.draws_per_score]

    def _open_gates(self, particles: Particles, v: Float[Tensor, "K B"]) -> None:
        """Open the gates of all particles; fresh ones weigh nothing."""
        particles.open_gates(torch.cat([v, torch.zeros_like(particles.log_weights[len(v) :])]))

    def _score_part(
        self,
        programs: Programs,
        particles: Particles,
        bound: Float[Tensor, " B"],
        site_surrogate: SiteSurrogate = plain_surrogate,
    ) -> Float[Tensor, ""]:
        """Compute the surrogate of the scores, and of what a learned baseline learns."""
        surrogate = bound.new_zeros(())
        grouped = _groups(particles.log_weights.detach(), self.draws_per_score)  # [K + fresh, B]
        baselines: dict[int, Tensor] = {}  # each once per draw: a learned one remembers what it has seen
        for score in particles.scores:
            baseline = self.baseline if score.estimator is None else score.estimator
            if id(baseline) not in baselines:
                c = baselines[id(baseline)] = self._baseline(baseline, score.name, grouped, programs)
                if c.requires_grad:  # it is trained to predict the bound
                    surrogate = surrogate - (finite(bound - c) ** 2).sum()
            log_q = _first_of_groups(score, self.draws_per_score)[: self.num_particles]
            coefficient = learning_signal(bound, baselines[id(baseline)].detach())
            surrogate = surrogate + site_surrogate(score, coefficient, log_q)
        return surrogate

    def _baseline(
        self, baseline: ScoreBaseline, site: str, log_weights: Float[Tensor, "N B"], programs: Programs
    ) -> Float[Tensor, "K B"]:
        """Compute c from the weights of all N particles: the K and the fresh ones."""
        least = getattr(baseline, "min_particles", 1)
        if self.num_particles < least:
            raise ValueError(
                f"site '{site}': expected at least {least} particles for its baseline "
                f"{baseline_name(baseline)!r}, got {self.num_particles}"
            )
        own = log_weights[: self.num_particles]
        if isinstance(baseline, LearnedBaseline):
            args, kwargs = programs.as_given
            return baseline(own, *args, **kwargs)
        if fresh := getattr(baseline, "fresh_particles", 0):
            if len(log_weights) < self.num_particles + fresh:
                raise ValueError(
                    f"site '{site}': expected {baseline_name(baseline)!r} as the objective's own baseline, which "
                    "draws its fresh particles, got it at the site alone"
                )
            return baseline(own, log_weights[self.num_particles : self.num_particles + fresh])
        return baseline(own)


def learning_signal(bound: Float[Tensor, " B"], c: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Compute L - c_k, finite where weights are zero.

    If all other particles weigh nothing, 0 takes the place of their mean. If all weigh nothing, nothing is learned
    (the loss is infinite).
    """
    coefficient = bound - torch.where(c == -math.inf, 0.0, c)
    return torch.where(bound == -math.inf, 0.0, coefficient)


def _groups(log_weights: Float[Tensor, "N B"], size: int) -> Float[Tensor, "K B"]:
    """Compute the log mean weight of each `size` consecutive particles."""
    if size == 1:
        return log_weights
    groups = log_weights.reshape(-1, size, log_weights.shape[-1])
    return groups.logsumexp(1) - math.log(size)


def _first_of_groups(score: SiteScore, size: int) -> Float[Tensor, "K B"]:
    """Take log q [K, B] of a site that the particles of a group share."""
    if size == 1:
        return score.log_prob
    groups = score.log_prob.reshape(-1, size, score.log_prob.shape[-1])
    if not bool(torch.isclose(groups, groups[:, :1], rtol=1e-4, atol=1e-6, equal_nan=True).all()):
        raise ValueError(
            f"site '{score.name}': expected the same distribution for all draws_per_score = {size} particles that "
            "share its value, but it depends on a reparameterised site"
        )
    return groups[:, 0]
