"""The K-sample bound, with any score baseline and pathwise rule."""

from __future__ import annotations

from typing import Unpack, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vma_pyro.infer.engine.estimator import Estimate, RunOptions
from vma_pyro.infer.engine.particles import Particles, concatenate
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.baselines import ScoreBaseline, vimco
from vma_pyro.infer.estimators.k_sample_bound import KSampleBound


@final
class MultiSampleELBO(KSampleBound):
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
        chunk_size: particles at a time; default None: all. With chunks memory does not grow with K, at the price
            of a second forward pass. The gradient is the same.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: K below 1, or below what the baseline needs; options that exclude each other.

    Example::

        elbo = MultiSampleELBO(num_particles=4, baseline=loo, pathwise=dreg, max_plate_nesting=1)
        loss = elbo(model, guide)(memory, x)       # minus the bound in nats, summed over datapoints
        loss.backward()
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        baseline: ScoreBaseline = vimco,
        pathwise: PathwiseRule = iwae,
        draws_per_score: int = 1,
        chunk_size: int | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(
            num_particles, baseline=baseline, pathwise=pathwise, draws_per_score=draws_per_score, **options
        )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        if chunk_size is not None and (self.noise == "common" or draws_per_score > 1):
            raise ValueError("chunk_size: expected None where particles share draws, got a number")
        self.chunk_size = chunk_size

    def _estimate(self, programs: Programs) -> Estimate:
        if self.chunk_size is None or not torch.is_grad_enabled():
            particles = self._particles(programs, self._all_particles())
        else:
            particles = self._particles_in_chunks(programs, self.chunk_size)
        return self._estimate_with(programs, particles)

    def _particles_in_chunks(self, programs: Programs, chunk_size: int) -> Particles:
        """Draw all particles, and keep no intermediate values in the graph."""
        total = self._all_particles()
        chunks: list[Particles] = []
        for start in range(0, total, chunk_size):
            chunks.append(self._forgetful_draw(programs, min(chunk_size, total - start)))
            if start == 0:
                programs = programs.with_subsamples(chunks[0].subsamples)
        return concatenate(chunks)

    def _forgetful_draw(self, programs: Programs, number: int) -> Particles:
        """Draw and keep no intermediate values: the backward pass draws the same particles once more."""
        drawn: list[Particles] | None = []

        def draw() -> tuple[Tensor, ...]:
            particles = self._particles(programs, number)
            if drawn is not None:
                drawn.append(particles)
            return (particles.log_weights, particles.log_p, *(s.log_prob for s in particles.scores))

        log_w, log_p, *log_q = checkpoint(draw, use_reentrant=False)
        assert drawn  # by `checkpoint`
        first = drawn[0]
        drawn = None  # the graph keeps `draw`, which must not keep the graph, nor what it draws again
        scores = tuple(s._replace(log_prob=q) for s, q in zip(first.scores, log_q, strict=True))
        return first._replace(log_weights=log_w, log_p=log_p, scores=scores, draws=())
