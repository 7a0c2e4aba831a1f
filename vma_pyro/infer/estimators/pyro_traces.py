"""Traces of the programs for Pyro's own estimators, checked for what would silently give a wrong value."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.infer.engine.checks import check_dimensions, check_nesting, check_no_enumeration, check_same_latents
from vma_pyro.infer.engine.masks import check_same_power, without_mask
from vma_pyro.infer.engine.options import SiteOptions, check_site_options
from vma_pyro.infer.engine.plates import Layout, Site, is_given, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import one_line, run

UNKNOWN_NESTING = 1_000  # more than any program has

TracePair = tuple[poutine.Trace, poutine.Trace]  # of the model, of the guide


def importance_traces(programs: Programs, *, nesting: float | int, enumerated: bool = False) -> TracePair:
    """Trace the guide and the model run against it, with log probabilities and score parts.

    Args:
        programs: the programs, and their arguments.
        nesting: number of plate dimensions, with the particles'; infinity: unknown.
        enumerated: whether dimensions further left are those of enumerated sites, of which the model may have some
            that the guide lacks.

    Raises:
        ValueError: latent sites that are not the same in model and guide, or not of the same mask and scale; a
            discrete auxiliary site; an estimator at a site; a dimension that no plate declares; NaN.
    """
    guide, args, kwargs = programs.guide, programs.args, programs.kwargs
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(f"guide: expected a program, got the handler {type(poutine.unwrap(guide)).__name__}")
    asked = SiteOptions()
    with one_line("guide", enumerated=enumerated):
        full = run(guide, args, kwargs)
    drawn = full.copy()
    for site in list(sample_sites(full)):
        if site["is_observed"]:
            drawn.remove_node(site["name"])  # given to the guide: not drawn, and nothing to replay
    summed = [site["name"] for site in sample_sites(full) if site["infer"].get("_enumerate_dim") is not None]
    with one_line("model", enumerated=enumerated):
        model_trace = run(poutine.replay(asked(programs.model), trace=drawn), args, kwargs, enumerated=summed)
    model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(full)
    _check(model_trace, guide_trace, asked.found, nesting=nesting, enumerated=enumerated)
    with one_line():
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
    for site in sample_sites(guide_trace):
        site["score_parts"] = site["score_parts"]._replace(score_function=_score(site))
    layout = Layout((), int(min(nesting, UNKNOWN_NESTING)))
    for site in (*sample_sites(model_trace), *sample_sites(guide_trace)):
        if not enumerated:
            check_dimensions(site, layout, 1, {})
        if is_validation_enabled() and bool(torch.isnan(site["log_prob"]).any()):
            raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
    return model_trace, guide_trace


def _check(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    model_options: dict[str, Any],
    *,
    nesting: float | int,
    enumerated: bool,
) -> None:
    """Refuse what the other estimators refuse as well."""
    options, latent = guide_trace, model_trace
    if enumerated:
        latent = model_trace.copy()
        for site in list(sample_sites(model_trace)):
            if site["infer"].get("enumerate") and site["name"] not in guide_trace:
                latent.remove_node(site["name"])
    else:
        check_no_enumeration(guide_trace)
        options = poutine.Trace()  # but for Pyro's own
        for site in sample_sites(guide_trace):
            infer = {key: value for key, value in site["infer"].items() if key != "baseline"}
            options.add_node(site["name"], **{**site, "infer": infer})
    what = "EnumeratedELBO" if enumerated else "GraphELBO"
    check_site_options(options, model_options, baselines=False, rules=False, what=what)
    check_same_latents(latent, guide_trace)
    check_same_power(model_trace, guide_trace)
    for trace in (model_trace, guide_trace):
        check_nesting(trace, int(min(nesting, UNKNOWN_NESTING)))


def _score(site: Site) -> Any:
    """Compute the score, also under masks and `to_event`, where Pyro loses it; a given value has none."""
    if is_given(site):
        return 0
    fn, inner = without_mask(site["fn"]), 0
    while isinstance(fn, torch.distributions.Independent):
        inner, fn = inner + fn.reinterpreted_batch_ndims, fn.base_dist
    if fn is site["fn"]:
        return site["score_parts"].score_function
    score = fn.score_parts(site["value"]).score_function
    return sum_rightmost(score, inner) if isinstance(score, Tensor) else score
