"""Running a guide and the model on its draws, and checking the two traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape

from vma_pyro.infer.engine.checks import (
    check_dimensions,
    check_nesting,
    check_no_enumeration,
    check_no_inner_subsampling,
    check_same_latents,
    latents,
)
from vma_pyro.infer.engine.gates import Gate, GateValues, set_gates
from vma_pyro.infer.engine.handlers import EnumerateValues
from vma_pyro.infer.engine.masks import check_same_power
from vma_pyro.infer.engine.options import SiteOptions
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.plates import Layout, Site, drawn_by, sample_sites
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.engine.running import run

CheckGuide = Callable[[poutine.Trace, dict[str, Any]], None]  # its trace, and what the model's sites ask for


class Traces(NamedTuple):
    """Traces of one run of model and guide, with log probabilities."""

    model: poutine.Trace
    guide: poutine.Trace
    subsamples: poutine.Trace  # the sites that chose the elements of their plates
    gates: tuple[Gate, ...]  # of the guide's reparameterised sites
    enumerated: dict[str, int]  # the dimension of each site whose values are enumerated
    layout: Layout


class Run(NamedTuple):
    """Settings of one run of model and guide; those of the same name are explained at `draw`."""

    layout: Layout
    particles: int  # K
    in_plate: bool  # whether the particles are in a plate
    pathwise: PathwiseRule | None = iwae
    handlers: Sequence[Handler] = ()  # with those that enumerate values
    linear: bool = False
    check_guide: CheckGuide | None = None

    def trace(self, programs: Programs) -> Traces:
        """Trace the guide, and the model replayed against it."""
        enumerated = {h.site: -h.dims - 1 for h in self.handlers if isinstance(h, EnumerateValues)}
        gated = GateValues(self.pathwise or iwae, enumerated)
        args, kwargs = programs.args, programs.kwargs
        handled = programs.guide
        for handler in self.handlers:
            handled = handler(handled)
        if self.pathwise is not None:
            handled = gated(handled)
        all_guide = run(handled, args, kwargs, enumerated=enumerated)
        guide = prune_subsample_sites(all_guide)
        self._check(guide)
        for name in sorted(enumerated.keys() - latents(guide)):
            drawn = sorted(latents(guide))
            raise ValueError(f"site '{name}': expected among the latent sites of the guide, found {drawn}")
        guide.compute_score_parts()
        gates = set_gates(guide, self.layout.of_program(guide) if latents(guide) else self.layout, gated)
        asked = SiteOptions()
        replayed = poutine.replay(asked(programs.model), trace=drawn_by(all_guide))
        all_model = run(replayed, args, kwargs, enumerated=enumerated)
        model = prune_subsample_sites(all_model)
        layout = self.layout.of_program(guide, model)
        if self.check_guide is not None:
            self.check_guide(guide, asked.found)
        check_same_latents(model, guide)
        check_same_power(model, guide)
        self._check(model)
        model.compute_log_prob()
        nodes: dict[str, Site] = guide.nodes
        leading = {dim: len(nodes[name]["value"]) for name, dim in enumerated.items()}
        sites = [*sample_sites(model), *sample_sites(guide)]
        check_shapes(sites, layout, self.particles, leading, nesting=layout.nesting + self.in_plate)
        return Traces(model, guide, _subsamples(all_guide, all_model), gates, enumerated, layout)

    def _check(self, trace: poutine.Trace) -> None:
        check_no_enumeration(trace)
        check_nesting(trace, self.layout.nesting + self.in_plate)
        if not self.linear:
            check_no_inner_subsampling(trace, self.layout)


def check_shapes(
    sites: Iterable[Site], layout: Layout, particles: int, leading: Mapping[int, int], *, nesting: int
) -> None:
    """Refuse undeclared dimensions at any site; see `check_dimensions`. `nesting` counts the particles' plate."""
    for site in sites:
        check_dimensions(site, layout, particles, leading)
        if is_validation_enabled():
            check_site_shape(site, nesting)


def _subsamples(*traces: poutine.Trace) -> poutine.Trace:
    """Copy the sites that chose the elements of their plates."""
    found = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in found:
                found.add_node(name, **site.copy())
    return found
