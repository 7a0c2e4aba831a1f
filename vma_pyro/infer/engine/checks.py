"""What traces of model and guide must satisfy; each error is one line and names the site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero

from vma_pyro.infer.engine.distributions import is_point
from vma_pyro.infer.engine.masks import has_same_power, score_of
from vma_pyro.infer.engine.pathwise import PathwiseRule
from vma_pyro.infer.engine.plates import PARTICLES, Layout, Site, is_given, sample_sites


def latents(trace: poutine.Trace) -> set[str]:
    """Name the sites that are random and not observed."""
    return {site["name"] for site in sample_sites(trace) if not site["is_observed"]}


def check_no_enumeration(guide_trace: poutine.Trace) -> None:
    """Refuse a site that is left for enumeration."""
    for site in sample_sites(guide_trace):
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"site '{site['name']}': expected a site to sample, but it is marked for enumeration "
                f"({site['infer']['enumerate']!r}); remove the mark or use TraceEnum_ELBO"
            )


def check_same_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse latent sites of one program alone, but for auxiliary ones that others are a function of.

    A value that is given in both (`pyro.condition`, `obs=`) is no latent: its log p counts, its log q does not.
    """
    in_model, in_guide = latents(model_trace), latents(guide_trace)
    for site in sample_sites(guide_trace):
        if is_given(site):
            _check_given(site, model_trace)
    for name in sorted(in_model - in_guide):
        raise ValueError(f"site '{name}': expected in the guide as in the model, guide has {sorted(in_guide)}")
    auxiliary = {s["name"] for s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary")}
    for name in sorted(in_guide - in_model):
        if name in model_trace and model_trace.nodes[name]["is_observed"]:
            raise ValueError(
                f"site '{name}': expected drawn in both programs or given in both, but its value is given in the "
                "model and drawn in the guide; condition the guide as well"
            )
        if name not in auxiliary:
            raise ValueError(f"site '{name}': expected in the model as in the guide, model has {sorted(in_model)}")
    _check_auxiliary(sorted(in_guide - in_model), in_model & in_guide, guide_trace)


def _check_given(site: Site, model_trace: poutine.Trace) -> None:
    """Refuse a value given in the guide that is not the model's data."""
    name, value = site["name"], site["value"]
    other: Site = model_trace.nodes.get(name)
    if other is None or other["type"] != "sample" or not other["is_observed"]:
        raise ValueError(
            f"site '{name}': expected its value given in the model as in the guide, got it in the guide alone; "
            "condition the model as well"
        )
    if other["value"] is not value and not (
        other["value"].shape == value.shape and torch.equal(other["value"], value)
    ):
        raise ValueError(f"site '{name}': expected the same given value in model and guide, got two that differ")


def _check_auxiliary(names: Sequence[str], shared: set[str], guide_trace: poutine.Trace) -> None:
    """Refuse a site of the guide alone, unless latents are a function of it, as in Pyro's autoguides.

    There the latents are `Delta` sites whose log density makes up for the change of variables. Any other
    auxiliary draw u leaves 1 / q(u) in the weight, whose mean is not p(x): it needs a reverse model r(u | z).
    """
    sites: dict[str, Site] = {name: guide_trace.nodes[name] for name in names}
    order = list(guide_trace.nodes)
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site '{name}': expected in the model as in the guide, even as an auxiliary one, as it is "
                f"discrete: p/q is no weight without a reverse model r({name} | latents) in the model"
            )
        later = order[order.index(name) :]
        auxiliary = [n for n in later if n in sites]
        points = [n for n in later if n in shared and is_point(guide_trace.nodes[n]["fn"])]
        # Those before the next auxiliary site, where they are enough (one for each latent), else all.
        own = points if len(auxiliary) == 1 else [n for n in points if n in later[: later.index(auxiliary[1])]]
        if _numbers(guide_trace, own) >= _numbers(guide_trace, [name]):
            points, auxiliary = own, [name]
        functions: list[Site] = [guide_trace.nodes[n] for n in points]
        # A simplex has one value more than is drawn.
        if _numbers(guide_trace, auxiliary) > _numbers(guide_trace, points):
            raise ValueError(
                f"site '{name}': expected latents that are a function of all of this auxiliary site (Delta "
                f"sites), found too few: p/q is no weight without a reverse model r({name} | latents) in the model"
            )
        for other in functions:
            if not has_same_power(site, other):
                raise ValueError(
                    f"site '{name}': expected the mask and scale of '{other['name']}', which is a function of "
                    "it, got others: p/q is no weight; put the same handlers around both"
                )


def _numbers(trace: poutine.Trace, names: Sequence[str]) -> int:
    sites: list[Site] = [trace.nodes[name] for name in names]
    return sum(site["value"].numel() for site in sites)


def check_nesting(trace: poutine.Trace, nesting: int) -> None:
    """Refuse a plate that is further left than announced."""
    for site in sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and -frame.dim > nesting:
                raise ValueError(
                    f"max_plate_nesting: expected at least {-frame.dim}, as plate '{frame.name}' of site "
                    f"'{site['name']}' is at dimension {frame.dim}, got {nesting}"
                )


def check_batch_plates_only(site: Site, layout: Layout) -> None:
    """Refuse several values per datapoint at a site whose values are enumerated."""
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.name not in (*layout.batch_plates, PARTICLES):
            raise ValueError(
                f"site '{site['name']}': expected in the batch plates {list(layout.batch_plates)} alone, as its "
                f"values are chosen together, found also in '{frame.name}'"
            )


def same_scale(site: Site, its_scale: float, scale: float | None) -> float:
    """Return the subsampling scale of a site; refuse one that is not that of the sites before."""
    if scale is not None and abs(its_scale - scale) > 1e-9 * scale:
        raise ValueError(
            f"site '{site['name']}': expected subsampling scale {scale} in its batch plates as at the others, "
            f"got {its_scale}"
        )
    return its_scale


def check_nothing_depends_on(site: Site, later: Sequence[Site], rule: PathwiseRule) -> None:
    """Refuse a detached rule where a later draw of the guide depends on the value (a `Delta` is no draw)."""
    for other in later:
        if not is_point(other["fn"]) and not other["is_observed"] and _depends(other, site["value"]):
            raise ValueError(
                f"site '{site['name']}': expected no latent site of the guide to depend on it under the rule "
                f"'{rule.name}', but '{other['name']}' does; use iwae there"
            )


def _depends(site: Site, value: torch.Tensor) -> bool:
    """Tell whether a site's distribution depends on a value."""
    results = [site["value"]]  # reparameterised: a function of what its distribution depends on
    with suppress(KeyError, NotImplementedError):  # a flow that knows the density of its own draws only
        results.append(site["fn"].log_prob(site["value"].detach()))
    return any(is_function_of(result, value) for result in results)


def is_function_of(result: torch.Tensor, value: torch.Tensor) -> bool:
    """Tell whether autograd's graph has a path from one to the other."""
    if not result.requires_grad or not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(result.sum(), value, retain_graph=True, allow_unused=True)
    return gradient is not None


def check_dimensions(site: Site, layout: Layout, particles: int, leading: Mapping[int, int]) -> None:
    """Refuse a dimension of a log probability that is not of a plate, of the particles, or of enumerated values.

    It would be averaged over as if it were particles, inside the logarithm. There are so many `particles`, and
    `leading` has the number of enumerated values by dimension.
    """
    shape = site["log_prob"].shape
    allowed = {-layout.nesting - 1: particles, **leading}
    allowed |= {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and shape[dim] != allowed.get(dim, 1):
            raise ValueError(
                f"site '{site['name']}': expected one log probability per element of its plates, got shape "
                f"{list(shape)}, whose dimension {dim} of size {shape[dim]} no plate declares; declare it with a "
                "plate or with to_event, or check the shape of the data"
            )


def check_no_inner_subsampling(trace: poutine.Trace, layout: Layout) -> None:
    """Refuse the sum over a plate, estimated from a part of it, inside a logarithm."""
    for site in sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            full = getattr(frame, "full_size", None) or frame.size
            if frame.name not in (*layout.batch_plates, PARTICLES) and full != frame.size:
                raise ValueError(
                    f"site '{site['name']}': expected all {full} elements of plate '{frame.name}', as it is no "
                    f"batch plate, got a subsample of {frame.size}: inside the logarithm of a K-sample bound "
                    "it gives no bound; use a single-sample objective such as RLOO, or make it a batch plate"
                )


def is_reparameterised(site: Site) -> bool:
    """Tell by the score parts, not by the family, whether gradients reach the guide through the value alone."""
    return is_identically_zero(score_of(site))
