"""The latent sites of a guide, and whether they can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.util import prune_subsample_sites

from vma_pyro.infer.engine.checks import is_reparameterised
from vma_pyro.infer.engine.distributions import is_finite, too_many, whole_support
from vma_pyro.infer.engine.plates import is_random_subsample, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import run

MOST_OUTCOMES = 2_000_000  # of all particles and datapoints together


class DiscreteSite(NamedTuple):
    """One discrete site of a guide; the size of its support is None where it cannot be enumerated."""

    name: str
    size: int | None
    why_not: str = ""


class GuideSites(NamedTuple):
    """The latent sites of a guide, in the order in which it draws them."""

    discrete: tuple[DiscreteSite, ...]  # those that are not reparameterised
    is_random_otherwise: bool  # other sites or subsampled plates are drawn, so that enumeration is not exact

    @property
    def values(self) -> int:
        """The number of joint values of the discrete sites."""
        return math.prod(site.size or 1 for site in self.discrete)

    def why_not_enumerated(self, num_particles: int, datapoints: int) -> str:
        """Tell what stands against `EnumeratedReference`, or ""."""
        for site in self.discrete:
            if site.size is None:
                return f"site '{site.name}' {site.why_not}"
        if not self.discrete:
            return "the guide has no discrete site"
        if self.values**num_particles * datapoints > MOST_OUTCOMES:
            return f"{self.values}^{num_particles} outcomes of {datapoints} datapoints are too many to sum"
        return ""


def find_sites(programs: Programs, batch_plates: Sequence[str] = ("data",)) -> GuideSites:
    """Run the guide once, and find its latent sites."""
    with torch.no_grad():
        programs = programs.prepared()
        trace = run(programs.guide, programs.args, programs.kwargs)
        others = any(is_random_subsample(site) for site in trace.nodes.values())
        trace = prune_subsample_sites(trace)
        trace.compute_score_parts()
    discrete = []
    for site in sample_sites(trace):
        if site["is_observed"]:
            continue
        if is_reparameterised(site) and getattr(site["fn"], "has_rsample", True):
            others = True
            continue
        discrete.append(DiscreteSite(site["name"], *_size(site, batch_plates)))
    return GuideSites(tuple(discrete), others)


def _size(site: Any, batch_plates: Sequence[str]) -> tuple[int | None, str]:
    """Measure a site's support; None and the reason, if it cannot be enumerated."""
    fn = site["fn"]
    if not is_finite(fn):
        return None, f"has no finite support ({type(fn).__name__})"
    # In a plate of its own a site has many values per datapoint, which are not enumerated.
    others = [f.name for f in site["cond_indep_stack"] if f.vectorized and f.name not in batch_plates]
    if others:
        return None, f"has many values per datapoint, in plate '{others[0]}'"
    try:
        many = too_many(fn)
    except NotImplementedError:  # such as a Binomial with a total count for each datapoint
        return None, "has a support that differs between datapoints"
    return (None, f"has {many} joint values, too many to list") if many else (len(whole_support(fn)), "")
