"""What traces of model and guide must satisfy; each error is one line and names the site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero

from vma_pyro.infer.pathwise import PathwiseRule
from vma_pyro.infer.plates import PARTICLES, Layout, Site, sample_sites


def latents(trace: poutine.Trace) -> set[str]:
    """Names of the sites that are random and not observed."""
    return {site["name"] for site in sample_sites(trace) if not site["is_observed"]}


def check_no_enumeration(guide_trace: poutine.Trace) -> None:
    """No site is left for enumeration."""
    for site in sample_sites(guide_trace):
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"site '{site['name']}': expected a site to sample, but it is marked for enumeration "
                f"({site['infer']['enumerate']!r}); remove the mark or use TraceEnum_ELBO"
            )


def check_same_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Model and guide have the same latent sites, but for the guide's auxiliary ones."""
    auxiliary = {s["name"] for s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary")}
    in_model, in_guide = latents(model_trace), latents(guide_trace)
    for name in sorted(in_model - in_guide):
        raise ValueError(f"site '{name}': expected in the guide as in the model, guide has {sorted(in_guide)}")
    for name in sorted(in_guide - in_model - auxiliary):
        raise ValueError(f"site '{name}': expected in the model as in the guide, model has {sorted(in_model)}")


def check_nesting(trace: poutine.Trace, nesting: int) -> None:
    """No plate is further left than said."""
    for site in sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and -frame.dim > nesting:
                raise ValueError(
                    f"max_plate_nesting: expected at least {-frame.dim}, as plate '{frame.name}' of site "
                    f"'{site['name']}' is at dimension {frame.dim}, got {nesting}"
                )


def check_batch_plates_only(site: Site, layout: Layout) -> None:
    """A site whose values are chosen has one value per datapoint."""
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.name not in (*layout.batch_plates, PARTICLES):
            raise ValueError(
                f"site '{site['name']}': expected in the batch plates {list(layout.batch_plates)} alone, as its "
                f"values are chosen together, found also in '{frame.name}'"
            )


def same_scale(site: Site, its_scale: float, scale: float | None) -> float:
    """The subsampling scale of a site, which is that of the sites before."""
    if scale is not None and abs(its_scale - scale) > 1e-9 * scale:
        raise ValueError(
            f"site '{site['name']}': expected subsampling scale {scale} in its batch plates as at the others, "
            f"got {its_scale}"
        )
    return its_scale


def check_nothing_depends_on(site: Site, later: Sequence[Site], rule: PathwiseRule) -> None:
    """A detached rule holds only where nothing later in the guide depends on the value."""
    for other in later:
        log_prob = other["fn"].log_prob(other["value"].detach()).sum()
        if log_prob.requires_grad:
            (gradient,) = torch.autograd.grad(log_prob, site["value"], retain_graph=True, allow_unused=True)
            if gradient is not None:
                raise ValueError(
                    f"site '{site['name']}': expected no latent site of the guide to depend on it under the rule "
                    f"'{rule.name}', but '{other['name']}' does; use iwae there"
                )


def is_reparameterised(site: Site) -> bool:
    """Whether gradients reach the guide through the value alone; told by the score parts, not by the family."""
    return is_identically_zero(site["score_parts"].score_function)


def name_of(estimator: Any) -> str:
    """The name of a baseline or rule, for tables and errors."""
    return repr(getattr(estimator, "name", None) or getattr(estimator, "__name__", None) or estimator)
