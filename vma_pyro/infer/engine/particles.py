"""Weighted draws of a guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from pyro import poutine
from torch import Tensor

from vma_pyro.infer.engine.gates import Gate
from vma_pyro.infer.engine.plates import Layout, Site


class SiteScore(NamedTuple):
    """log q of one guide site that is not reparameterised; zero for a datapoint whose sites are all masked.

    Neither masks of single sites nor scales enter: they change the weight of a draw, and not its probability.
    """

    name: str
    log_prob: Float[Tensor, "*S K B"]
    estimator: Callable[..., Tensor] | None  # the score baseline that the site asks for; None: the objective's
    layout: Layout
    site: Site  # in the first of several runs


class SiteGate(NamedTuple):
    """The gate of a reparameterised site in so many particles from the start on."""

    start: int
    particles: int
    gate: Gate


class Particles(NamedTuple):
    """K weighted draws of the guide for each of B datapoints; `*S` are dimensions of enumerated sites.

    Attributes:
        log_weights: log w, differentiable in the parameters of the model, in those of the guide inside log q, and
            through reparameterised values. With enumerated values: log of q(values) w.
        log_p: log p(x, latents) alone.
        log_q: log q(latents) of the guide itself.
        log_proposal: log probability under what the latents were drawn from: q, unless a handler widened it.
        log_q_reparameterised: the part of log q of the reparameterised sites.
        scores: log q of each guide site that is not reparameterised.
        log_q_enumerated: log q of the enumerated sites, without masks and scales; zero without any.
        live: whether any site of the datapoint counts.
        scale: full size over subsample size of the batch plates, which multiplies the bound.
        batch_shape: sizes of the batch plates; B is their product.
        gates: gates of reparameterised sites under another pathwise rule than `iwae`; see `open_gates`.
        subsamples: the draws of randomly subsampled plates, for further particles of the same datapoints.
        layout: where tensors of sites have particles and datapoints.
        draws: traces of the guide: one of all particles, or one of each; empty if they are not kept.
        enumerated_site: the last of the enumerated sites, and the layout of its tensors.
    """

    log_weights: Float[Tensor, "*S K B"]
    log_p: Float[Tensor, "*S K B"]
    log_q: Float[Tensor, "*S K B"]
    log_proposal: Float[Tensor, "*S K B"]
    log_q_reparameterised: Float[Tensor, "*S K B"]
    scores: tuple[SiteScore, ...]
    log_q_enumerated: Float[Tensor, "*S K B"]
    live: Bool[Tensor, "*S K B"]
    scale: float
    batch_shape: torch.Size
    gates: tuple[SiteGate, ...]
    subsamples: poutine.Trace
    layout: Layout
    draws: tuple[poutine.Trace, ...] = ()
    enumerated_site: tuple[Layout, Site] | None = None

    def at_datapoints(self, values: Float[Tensor, "..."]) -> Float[Tensor, " B"]:
        """Flatten values [plates] that belong to the enumerated site, such as its normaliser, to [B]."""
        assert self.enumerated_site is not None
        layout, site = self.enumerated_site
        return layout.per_datapoint(site, values).reshape(-1)

    @property
    def score(self) -> Float[Tensor, "*S K B"]:
        """The sum of log q over the sites that are not reparameterised."""
        return sum((site.log_prob for site in self.scores), torch.zeros_like(self.log_weights))

    def open_gates(self, normalised_weights: Float[Tensor, "*S K B"]) -> None:
        """Fix the factors on the gradients through reparameterised values; needed before the backward pass."""
        for start, count, gate in self.gates:
            v = normalised_weights.detach().narrow(-2, start, count)
            gate.open(v.reshape(*v.shape[:-1], *self.batch_shape))


def concatenate(runs: Sequence[Particles]) -> Particles:
    """Join the particles of several runs on the same datapoints."""
    names = [name for name in Particles._fields if isinstance(getattr(runs[0], name), Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(run, name) for run in runs], dim=-2) for name in names}
    gates: list[SiteGate] = []
    start = 0
    for run in runs:
        gates += [gate._replace(start=start + gate.start) for gate in run.gates]
        start += run.log_weights.shape[-2]
    draws = tuple(draw for run in runs for draw in run.draws)
    return runs[0]._replace(**tensors, scores=_join_scores(runs), gates=tuple(gates), draws=draws)


def _join_scores(runs: Sequence[Particles]) -> tuple[SiteScore, ...]:
    """Join scores by name of site; a site that a run did not come to has zeros there."""
    sites = {score.name: score for run in reversed(runs) for score in run.scores}
    by_name = [{score.name: score.log_prob for score in run.scores} for run in runs]
    joined = []
    for name, score in sites.items():
        parts = [
            found.get(name, torch.zeros_like(run.log_weights)) for run, found in zip(runs, by_name, strict=True)
        ]
        joined.append(score._replace(log_prob=torch.cat(parts, dim=-2)))
    return tuple(joined)
