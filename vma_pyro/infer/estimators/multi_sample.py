"""The multi-sample bound, with a pluggable score baseline and a pluggable pathwise rule."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vma_pyro.infer.engine.estimator import (
    Estimate,
    Estimator,
    Noise,
    RunOptions,
    log_mean_exp,
    normalised,
    weighted,
)
from vma_pyro.infer.engine.particles import Particles, SiteScore, concatenate
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.sharing import ShareDiscrete
from vma_pyro.infer.estimators.baselines import ScoreBaseline, baseline_name, vimco
from vma_pyro.infer.estimators.learned_baseline import LearnedBaseline


class MultiSampleELBO(Estimator):
    r"""The importance-weighted bound, one per datapoint, for guides with discrete and continuous sites.

    .. math::
        L = \log \frac1K \sum_k w_k, \qquad
        w_k = \frac{p(x, z_k, a_k)}{q(a_k) \, q(z_k \mid a_k)}, \qquad
        \log p(x) \ge E[L]

    (Burda et al. 2016, equation 8). Its gradient is estimated by

    .. math::
        \sum_k (L - c_k) \nabla \log q(a_k) + \nabla L

    where a are the sites that are not reparameterised, c_k is the score baseline (Mnih & Rezende 2016), and
    the second term differentiates L through the log probabilities and, by the pathwise rule, through the
    reparameterised sites. With subsampled batch plates the bounds are multiplied by full size over subsample size,
    outside the logarithm. A guide site may ask for another baseline or rule: `infer={"estimator": loo}`.

    Args:
        num_particles: K. Default 2; the paper trains with 4.
        baseline: c, a function of log weights [K, B]: `vimco` (default), `vimco_geometric`, `loo`, `reinforce`,
            `OVIS(gamma)`, `OVISMonteCarlo(samples)`, `NVIL(network)`, or your own.
        pathwise: `iwae` (default), `dreg` or `stl`; see `vma_pyro.infer.engine.pathwise`.
        draws_per_score: Z; each of the K draws of the discrete sites comes with so many of the reparameterised
            ones: K Z particles, whose mean weight over Z takes the place of w_k. Default 1.
        chunk_size: particles at a time; memory no longer grows with K, at the price of a second forward pass, in
            which the weights of all particles are known. The gradient is the same. Default None: all at once.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: K below 1, or below what the baseline needs; options that exclude each other.

    Example::

        elbo = MultiSampleELBO(num_particles=4, baseline=loo, pathwise=dreg, max_plate_nesting=1)
        loss = elbo(model, guide)(memory, x)       # minus the bound in nats, summed over datapoints
        loss.backward()
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
        chunk_size: int | None = None,
        noise: Noise = "independent",
        **options: Unpack[RunOptions],
    ) -> None:
        self.baseline, self.pathwise = baseline, pathwise
        self.draws_per_score, self.chunk_size = draws_per_score, chunk_size
        self.min_particles = getattr(baseline, "min_particles", 1)
        super().__init__(num_particles, noise=noise, **options)
        self._check_options()
        single = num_particles * draws_per_score == 1
        if noise == "common" or draws_per_score > 1:
            self.objective = "iwae-coupled"  # a bound too, but another one
        self.unbiased = getattr(baseline, "unbiased", True) and (pathwise.unbiased or single)

    def _check_options(self) -> None:
        if self.draws_per_score < 1:
            raise ValueError(f"draws_per_score: expected at least 1, got {self.draws_per_score}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {self.chunk_size}")
        if self.noise == "common" and self.pathwise.detached:
            raise ValueError(
                f"pathwise: expected iwae with common noise, as '{self.pathwise.name}' takes the particles for "
                f"independent, got {self.pathwise.name}"
            )
        if self.chunk_size is not None and (self.noise == "common" or self.draws_per_score > 1):
            raise ValueError("chunk_size: expected None where particles share draws, got a number")

    def learned_parts(self) -> dict[str, nn.Module]:
        """The baseline, if it has parameters."""
        return {"baseline": self.baseline} if isinstance(self.baseline, nn.Module) else {}

    def _what(self) -> str:
        return f"baseline {baseline_name(self.baseline)!r}"

    def _estimate(self, programs: Programs) -> Estimate:
        nesting = self._nesting(programs)
        particles = self._particles(programs, nesting)
        log_w = self._own(particles.log_weights)
        bound, v = log_mean_exp(log_w).detach(), normalised(log_w)  # [B], [K, B]
        self._open_gates(particles, v)
        surrogate = weighted(v, log_w).sum() + self._score_part(programs, particles, bound)
        return Estimate(bound, surrogate, particles.scale)

    def _own(self, values: Float[Tensor, "N B"]) -> Float[Tensor, "K B"]:
        """Without the fresh particles of the baseline."""
        return values[: self.num_particles * self.draws_per_score]

    def _open_gates(self, particles: Particles, v: Float[Tensor, "K B"]) -> None:
        """Fresh particles weigh nothing."""
        particles.open_gates(torch.cat([v, torch.zeros_like(particles.log_weights[len(v) :])]))

    def _score_part(
        self, programs: Programs, particles: Particles, bound: Float[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """The surrogate of the scores, and of what a learned baseline learns."""
        surrogate = bound.new_zeros(())
        grouped = _groups(particles.log_weights.detach(), self.draws_per_score)  # [K + fresh, B]
        baselines: dict[int, Tensor] = {}  # each once per draw: a learned one remembers what it has seen
        for score in particles.scores:
            baseline = self.baseline if score.estimator is None else score.estimator
            if id(baseline) not in baselines:
                c = baselines[id(baseline)] = self._baseline(baseline, score.name, grouped, programs)
                if c.requires_grad:  # it is trained to predict the bound
                    surrogate = surrogate - _finite_square(bound - c).sum()
            log_q = _first_of_groups(score, self.draws_per_score)[: self.num_particles]
            coefficient = learning_signal(bound, baselines[id(baseline)].detach())
            surrogate = surrogate + self._surrogate_of(score, coefficient, log_q)
        return surrogate

    def _surrogate_of(
        self, score: SiteScore, coefficient: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]
    ) -> Float[Tensor, ""]:
        """The surrogate of one site's score."""
        return (coefficient * log_q).sum()

    def _handlers(self, nesting: int) -> list[Any]:
        """Effect handlers around the guide."""
        return [ShareDiscrete(self.draws_per_score, nesting)] if self.draws_per_score > 1 else []

    def _particles(self, programs: Programs, nesting: int) -> Particles:
        """K draws, and the fresh ones of the baseline."""
        fresh = getattr(self.baseline, "fresh_particles", 0)
        handlers = self._handlers(nesting)
        total = (self.num_particles + fresh) * self.draws_per_score
        options: dict[str, Any] = {"pathwise": self.pathwise, "handlers": handlers, "nesting": nesting}
        if self.chunk_size is None or not torch.is_grad_enabled():
            return self._draw(programs, total, **options)
        chunks: list[Particles] = []
        for start in range(0, total, self.chunk_size):
            size = min(self.chunk_size, total - start)
            chunks.append(self._forgetful_draw(programs, size, options))
            if start == 0:
                programs = programs.with_subsamples(chunks[0].subsamples)
        return concatenate(chunks)

    def _forgetful_draw(
        self,
        programs: Programs,
        num_particles: int,
        options: dict[str, Any],
    ) -> Particles:
        """A draw that keeps no intermediate values: the backward pass draws the same particles once more."""
        drawn: list[Particles] | None = []

        def draw() -> tuple[Tensor, ...]:
            particles = self._draw(programs, num_particles, **options)
            if drawn is not None:
                drawn.append(particles)
            return (particles.log_weights, particles.log_p, *(s.log_prob for s in particles.scores))

        log_w, log_p, *log_q = checkpoint(draw, use_reentrant=False)
        assert drawn  # by `checkpoint`
        first = drawn[0]
        drawn = None  # the graph keeps `draw`, which must not keep the graph, nor what it draws again
        scores = tuple(s._replace(log_prob=q) for s, q in zip(first.scores, log_q, strict=True))
        return first._replace(log_weights=log_w, log_p=log_p, scores=scores, draws=())

    def _baseline(
        self,
        baseline: ScoreBaseline,
        site: str,
        log_weights: Float[Tensor, "N B"],
        programs: Programs,
    ) -> Float[Tensor, "K B"]:
        """c from the weights of all particles, N = K + fresh ones."""
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
    """L - c_k, finite where weights are zero.

    If all other particles weigh nothing their mean is no baseline; 0 is one that depends on them alone. If all
    weigh nothing, nothing is learned (the loss is infinite).
    """
    coefficient = bound - torch.where(c == -math.inf, 0.0, c)
    return torch.where(bound == -math.inf, 0.0, coefficient)


def _groups(log_weights: Float[Tensor, "N B"], size: int) -> Float[Tensor, "K B"]:
    """Log mean weight of each `size` consecutive particles."""
    if size == 1:
        return log_weights
    groups = log_weights.reshape(-1, size, log_weights.shape[-1])
    return groups.logsumexp(1) - math.log(size)


def _first_of_groups(score: SiteScore, size: int) -> Float[Tensor, "K B"]:
    """log q [K, B] of a site that the particles of a group share."""
    if size == 1:
        return score.log_prob
    groups = score.log_prob.reshape(-1, size, score.log_prob.shape[-1])
    if not bool(torch.isclose(groups, groups[:, :1], rtol=1e-4, atol=1e-6, equal_nan=True).all()):
        raise ValueError(
            f"site '{score.name}': expected the same distribution for all draws_per_score = {size} particles that "
            "share its value, but it depends on a reparameterised site"
        )
    return groups[:, 0]


def _finite_square(difference: Tensor) -> Tensor:
    return torch.where(difference.isfinite(), difference, 0.0) ** 2
