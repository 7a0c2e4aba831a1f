"""The multi-sample bound with a pluggable score baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer.elbo import ELBO
from torch import Tensor

from vma_pyro.infer.baselines import ScoreBaseline, vimco
from vma_pyro.infer.log_weights import Particles, PlateNesting, Program, draw_particles


class MultiSampleELBO(ELBO):
    r"""The importance-weighted bound, one per datapoint, for guides with discrete and continuous sites.

    .. math::
        L = \log \frac1K \sum_k w_k, \qquad
        w_k = \frac{p(x, z_k, a_k)}{q(a_k) \, q(z_k \mid a_k)}, \qquad
        \log p(x) \ge E[L]

    (Burda et al. 2016, equation 8). Its gradient is estimated by

    .. math::
        \sum_k (L - c_k) \nabla \log q(a_k) + \nabla L

    where a are the sites that are not reparameterised, c_k is the score baseline (Mnih & Rezende 2016), and
    the second term differentiates L through the log probabilities and the reparameterised sites. With
    subsampled batch plates the bounds are multiplied by full size over subsample size, outside the logarithm.

    Args:
        num_particles: K. Default 2; the paper trains with 4.
        baseline: c, a function of log weights [K, B]: `vimco` (default), `vimco_geometric`, `loo`, `reinforce`, or
            your own; see `vma_pyro.infer.baselines`.
        batch_plates: plates whose elements are the datapoints. Every site must lie inside them.
        max_plate_nesting: number of plate dimensions in the programs; None runs them once more to find out.
        vectorize_particles: run all particles at once (default) or one after the other.
        retain_graph: keep the graph after `loss_and_grads`.

    Raises:
        ValueError: K below 1, or below what the baseline needs.

    Example::

        elbo = MultiSampleELBO(num_particles=4, baseline=loo, max_plate_nesting=1)
        loss = elbo(model, guide)(memory, x)       # minus the bound in nats, summed over datapoints
        loss.backward()
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        baseline: ScoreBaseline = vimco,
        batch_plates: Sequence[str] = ("data",),
        max_plate_nesting: int | None = None,
        vectorize_particles: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles: expected at least 1, got {num_particles}")
        name, least = getattr(baseline, "__name__", repr(baseline)), getattr(baseline, "min_particles", 1)
        if num_particles < least:
            raise ValueError(
                f"num_particles: expected at least {least} for baseline '{name}', got {num_particles}"
            )
        if isinstance(batch_plates, str) or not batch_plates:
            raise ValueError(f"batch_plates: expected a sequence of plate names, got {batch_plates!r}")
        super().__init__(
            num_particles=num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        # The base class would add one for the particle plate and overwrite a guess in place.
        self.max_plate_nesting = max_plate_nesting
        self.baseline = baseline
        self.batch_plates = tuple(batch_plates)
        self._guess_plate_nesting = PlateNesting()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints; its gradient is the estimator's."""
        particles = self._draw(model, guide, args, kwargs)
        bound = log_mean_exp(particles.log_weights)  # [B]
        with torch.no_grad():
            c = self.baseline(particles.log_weights.detach())
            # If all other particles weigh nothing their mean is no baseline; 0 is one that depends on them alone.
            coefficient = bound - torch.where(c == -math.inf, 0.0, c)  # [K, B]
            coefficient = torch.where(bound == -math.inf, 0.0, coefficient)  # all weigh nothing: the loss is inf
        learning_signal = (coefficient * particles.score).sum()
        # The score part has a gradient but no value: the loss stays the bound.
        surrogate = bound.sum() + (learning_signal - learning_signal.detach())
        return -particles.scale * surrogate

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters. `pyro.infer.SVI` calls it."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound in nats, summed over datapoints, without gradients."""
        particles = self._draw(model, guide, args, kwargs)
        return -particles.scale * log_mean_exp(particles.log_weights).sum().item()

    def _draw(self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> Particles:
        nesting = self.max_plate_nesting
        if nesting is None:
            nesting = self._guess_plate_nesting(model, guide, args, kwargs)
        return draw_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            batch_plates=self.batch_plates,
            max_plate_nesting=nesting,
            vectorize=self.vectorize_particles,
        )

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Pyro's abstract hook; this objective draws its particles in `vma_pyro.infer.log_weights`."""
        raise NotImplementedError("MultiSampleELBO draws with vma_pyro.infer.draw_particles")


def log_mean_exp(log_weights: Float[Tensor, " K *B"]) -> Float[Tensor, "*B"]:
    """log 1/K sum_k exp, over the first dimension."""
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))
