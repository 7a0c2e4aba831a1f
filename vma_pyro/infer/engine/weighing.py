"""Weighing particles: the log probabilities of two traces are summed over the sites of each datapoint.

A site belongs to datapoint b when it lies in the batch plates; a site outside them belongs to no datapoint and is
refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from vma_pyro.infer.engine.checks import check_batch_plates_only, is_reparameterised, same_scale
from vma_pyro.infer.engine.defensive import Defended
from vma_pyro.infer.engine.gates import power_of
from vma_pyro.infer.engine.masks import mask_of, score_of
from vma_pyro.infer.engine.particles import Particles, SiteGate, SiteScore
from vma_pyro.infer.engine.plates import Layout, Site, is_given, sample_sites
from vma_pyro.infer.engine.tracing import Traces

Sum = Tensor | float  # [*S, K, *batch], or 0 where there is nothing to sum


def weigh(traces: Traces) -> Particles:
    """Sum log p - log q and the scores over the sites of each datapoint."""
    layout, sites = traces.layout, Sites(traces.layout)
    log_p = sum_model(traces.model, sites)
    guide = sum_guide(traces.guide, sites, traces.enumerated)
    log_w = _not_empty(log_p - guide.log_proposal)
    scores, live = guide.scores, torch.ones(log_w.shape, dtype=torch.bool, device=log_w.device)
    if not any(mask is True for mask in sites.masks):
        live = _live(sites.masks, log_w)
        scores = [s._replace(log_prob=torch.where(live, s.log_prob, 0.0)) for s in scores]

    def flat(values: Sum) -> Tensor:
        values = torch.as_tensor(values, dtype=log_w.dtype, device=log_w.device)
        return layout.flat(values.expand(log_w.shape))

    return Particles(
        log_weights=flat(log_w),
        log_p=flat(log_p),
        log_q=flat(guide.log_q),
        log_proposal=flat(guide.log_proposal),
        log_q_reparameterised=flat(guide.log_q_reparameterised),
        scores=tuple(s._replace(log_prob=flat(s.log_prob)) for s in scores),
        log_q_enumerated=flat(guide.log_q_enumerated),
        live=layout.flat(live),
        scale=sites.scale or 1.0,
        batch_shape=log_w.shape[layout.leading + 1 :],
        gates=tuple(SiteGate(0, log_w.shape[layout.leading], gate) for gate in traces.gates),
        subsamples=traces.subsamples,
        layout=layout,
        draws=(traces.guide,),
        enumerated_site=guide.enumerated_site,
    )


def sum_model(trace: poutine.Trace, sites: Sites) -> Sum:
    """Sum log p over all sites of a trace of the model."""
    log_p: Sum = 0.0
    for site in sample_sites(trace):
        log_p = log_p + sites.log_prob(site)
    return log_p


def sum_guide(trace: poutine.Trace, sites: Sites, enumerated: Collection[str] = ()) -> GuideSums:
    """Sum over the sites that the guide draws; where a value is given nothing was drawn."""
    sums, layout = GuideSums(), sites.layout
    for site in sample_sites(trace):
        if is_given(site):
            continue
        log_prob = sites.log_prob(site)
        if site["name"] in enumerated:
            check_batch_plates_only(site, layout)
            sums.enumerated_site = (layout, site)
            log_q = layout.per_datapoint(site, site["fn"].log_prob(site["value"]))
            sums.log_q_enumerated = sums.log_q_enumerated + log_q
            sums.log_proposal = sums.log_proposal + _beyond_drawing(site, layout)
            continue
        sums.log_proposal = sums.log_proposal + log_prob
        sums.log_q = sums.log_q + _log_q(site, sites, log_prob)
        if is_reparameterised(site):
            sums.log_q_reparameterised = sums.log_q_reparameterised + log_prob
        else:
            score = layout.per_datapoint(site, score_of(site))
            sums.scores.append(SiteScore(site["name"], score, site["infer"].get("estimator"), layout, site))
    return sums


def sum_log_prob(sums: Sum, layout: Layout) -> Float[Tensor, "K B"]:
    """Flatten a sum of log probabilities to one dimension of datapoints."""
    return layout.flat(_not_empty(sums))


@dataclass
class GuideSums:
    """Sums over the sites of a guide, [*S, K, *batch]; those of the same name in `Particles`."""

    log_q: Sum = 0.0
    log_proposal: Sum = 0.0
    log_q_reparameterised: Sum = 0.0
    log_q_enumerated: Sum = 0.0
    scores: list[SiteScore] = field(default_factory=list)
    enumerated_site: tuple[Layout, Site] | None = None


class Sites:
    """Reads log probabilities of one site after the other, and checks that the sites agree."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.scale: float | None = None  # of subsampling, the same for all; None before the first
        self.masks: list[Tensor | bool] = []  # of the sites, per datapoint

    def log_prob(self, site: Site) -> Tensor:
        """Read the log probability of a site for each datapoint, without the scale of subsampling."""
        self.scale = same_scale(site, self.layout.subsampling_scale(site), self.scale)
        log_prob = self.layout.per_datapoint(site, self.unscaled(site["log_prob"]))
        if is_validation_enabled() and bool(torch.isnan(log_prob).any()):
            raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
        self.masks.append(self.layout.any_per_datapoint(site, mask_of(site).any_in_event()))
        return log_prob

    def unscaled(self, log_prob: Tensor) -> Tensor:
        """Take the batch plates' share out of the scale, which covers all enclosing plates."""
        return log_prob if self.scale in (None, 1) else log_prob / self.scale


def _not_empty(sums: Sum) -> Tensor:
    if not isinstance(sums, Tensor):
        raise ValueError("model: expected at least one sample site in the batch plates, found none")
    return sums


def _live(masks: Sequence[Tensor | bool], log_w: Tensor) -> Bool[Tensor, "..."]:
    """Tell which datapoints have a site that counts."""
    live = torch.zeros(log_w.shape, dtype=torch.bool, device=log_w.device)
    for mask in masks:
        live = live | torch.as_tensor(mask, device=log_w.device)
    return live


def _log_q(site: Site, sites: Sites, log_prob: Tensor) -> Tensor:
    """Read log q of a guide's site, also where it was drawn from a proposal around q."""
    if not isinstance(site["fn"], Defended):
        return log_prob
    own = scale_and_mask(site["fn"].guide.log_prob(site["value"]), site["scale"], site["mask"])
    return sites.layout.per_datapoint(site, sites.unscaled(own))


def _beyond_drawing(site: Site, layout: Layout) -> Tensor:
    """Compute log q^s - log q of a site whose values are enumerated: nothing for s = 1, even where q is zero."""
    power, _ = power_of(site, layout)  # it has no mask of its own, see `check_finite_support`
    log_q = site["fn"].log_prob(site["value"])
    return layout.per_datapoint(site, torch.where(power == 1, 0.0, (power - 1) * log_q))
