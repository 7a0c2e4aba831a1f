"""From traces to log weights per datapoint: where Pyro's traces are taken apart.

A particle k of datapoint b weighs log w = log p(x, latents) - log q(latents), summed over the sites of b. A site
belongs to datapoint b when it lies in the batch plates; a site outside them belongs to no datapoint and is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from vma_pyro.infer.engine.checks import (
    check_batch_plates_only,
    check_dimensions,
    check_nesting,
    check_no_enumeration,
    check_no_inner_subsampling,
    check_same_latents,
    is_reparameterised,
    latents,
    same_scale,
)
from vma_pyro.infer.engine.first_look import look
from vma_pyro.infer.engine.gates import Gate, GateValues, power_of, set_gates
from vma_pyro.infer.engine.handlers import ChooseValues, Defended, fixed
from vma_pyro.infer.engine.masks import check_same_power, mask_of, score_of
from vma_pyro.infer.engine.options import Options
from vma_pyro.infer.engine.particles import Particles, SiteGate, SiteScore, concatenate
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.plates import Layout, Program, Site, drawn_by, particle_plate, sample_sites
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.engine.running import run

CheckGuide = Callable[[poutine.Trace, dict[str, Any]], None]  # its trace, and what the model's sites ask for


class Traces(NamedTuple):
    """One run of model and guide.

    Attributes:
        model, guide: with log probabilities.
        subsamples: the sites that chose the elements of their plates.
        gates: of the guide's reparameterised sites.
        chosen: sites with given values, and their dimensions.
        layout: where tensors of sites have particles and datapoints.
    """

    model: poutine.Trace
    guide: poutine.Trace
    subsamples: poutine.Trace
    gates: tuple[Gate, ...]
    chosen: dict[str, int]
    layout: Layout


def draw_particles(
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int,
    vectorize: bool = True,
    pathwise: PathwiseRule | None = iwae,
    handlers: Sequence[Handler] = (),
    given: Sequence[ChooseValues] = (),
    linear: bool = False,
    check_guide: CheckGuide | None = None,
) -> Particles:
    """Run the guide K times and the model against it.

    Args:
        model, guide: any Pyro programs with the same latent sites.
        args, kwargs: arguments of both.
        num_particles: K.
        batch_plates: names of the plates whose elements are the datapoints, outermost dimension of B first; none:
            the whole program is one datapoint, as is a program without plates.
        max_plate_nesting: number of plate dimensions that model and guide use.
        vectorize: run once, with a particle plate at dimension -max_plate_nesting - 1; else K times.
        pathwise: rule of reparameterised sites that name none with `infer={"estimator": ...}`; None: `iwae`
            even of those that do.
        handlers: effect handlers around the guide, which see its sites with all plates.
        given: sites whose values are chosen instead of drawn; the first is at the leftmost dimension. Their weight
            is q w, so that a sum over all values is an expectation under q.
        linear: whether log weights are averaged, and not weights: then plates inside the datapoints may be
            subsampled.
        check_guide: refuses what sites ask for and cannot have.

    Raises:
        ValueError: a site outside the batch plates, a site of the model that the guide lacks or the reverse, a
            latent whose mask or scale differs between the two, a dimension that no plate declares, a site left for
            enumeration, an estimator that does not fit its site, NaN in a weight.
    """
    return draw(
        Programs(model, guide, args, kwargs or {}).prepared(),
        num_particles=num_particles,
        batch_plates=batch_plates,
        max_plate_nesting=max_plate_nesting,
        vectorize=vectorize,
        pathwise=pathwise,
        handlers=handlers,
        given=given,
        linear=linear,
        check_guide=check_guide,
    )


def draw(
    programs: Programs,
    *,
    num_particles: int,
    batch_plates: Sequence[str],
    max_plate_nesting: int,
    vectorize: bool = True,
    pathwise: PathwiseRule | None = iwae,
    handlers: Sequence[Handler] = (),
    given: Sequence[ChooseValues] = (),
    linear: bool = False,
    check_guide: CheckGuide | None = None,
) -> Particles:
    """`draw_particles` of prepared programs."""
    handlers = [*handlers, *given]
    linear = linear or (num_particles == 1 and not given)
    layout = Layout(tuple(batch_plates), max_plate_nesting, len(given))
    if vectorize or num_particles == 1:
        if num_particles > 1:
            programs = programs.under(particle_plate(num_particles, max_plate_nesting))
        once = _Run(layout, pathwise, handlers, num_particles, num_particles > 1, linear, check_guide)
        return _weigh(once.trace(programs))
    runs = []
    for _ in range(num_particles):
        each = _Run(layout, pathwise, handlers, 1, False, linear, check_guide)
        traces = each.trace(programs)
        runs.append(_weigh(traces))
        if len(runs) == 1:
            programs = programs.with_subsamples(traces.subsamples)
    return concatenate(runs)


def log_weights(
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int = 1,
) -> Float[Tensor, "K B"]:
    """log w [K, B] of K draws from the guide; see `draw_particles`."""
    programs = Programs(model, guide, args, kwargs or {}).prepared()
    if num_particles > 1:
        look.check(programs, max_plate_nesting)
    return draw(
        programs,
        num_particles=num_particles,
        batch_plates=batch_plates,
        max_plate_nesting=max_plate_nesting,
    ).log_weights


def log_weights_given(
    values: dict[str, Tensor],
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int = 1,
) -> Float[Tensor, "S K B"]:
    """log q(values) w [S, K, B] with one latent site fixed to S values, instead of drawn.

    q(values) w = p(x, values, rest) / q(rest | values): summed over all values of a discrete site, it estimates
    the marginal likelihood with that site summed exactly and the rest drawn.

    Args:
        values: name of a latent site to its values [S]; several sites are fixed together, value by value. The
            other arguments are those of `draw_particles`.
    """
    together = [ChooseValues(name, fixed(value), max_plate_nesting + 1) for name, value in values.items()]
    layout = Layout(tuple(batch_plates), max_plate_nesting, 1)
    programs = Programs(model, guide, args, kwargs or {}).prepared()
    programs = programs.under(particle_plate(num_particles, max_plate_nesting))
    once = _Run(layout, iwae, together, num_particles, in_plate=True, linear=False, check_guide=None)
    return _weigh(once.trace(programs)).log_weights


def guide_log_prob(
    guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], layout: Layout
) -> Float[Tensor, "1 B"]:
    """log q of the latents of one run of the guide, which may be replayed."""
    trace = prune_subsample_sites(run(guide, args, kwargs))
    trace.compute_score_parts()
    return _log_prob(guide=trace, layout=layout).log_q


def model_log_prob(
    model: Program, latents: poutine.Trace, args: Sequence[Any], kwargs: Mapping[str, Any], layout: Layout
) -> Float[Tensor, "1 B"]:
    """log p(x, latents) of given values of the latent sites."""
    trace = prune_subsample_sites(run(poutine.replay(model, trace=latents), args, kwargs))
    trace.compute_log_prob()
    return _log_prob(model=trace, layout=layout).log_p


def _log_prob(
    *, layout: Layout, model: poutine.Trace | None = None, guide: poutine.Trace | None = None
) -> Particles:
    """The sums over one of the traces, of a single particle."""
    traces = Traces(model or poutine.Trace(), guide or poutine.Trace(), poutine.Trace(), (), {}, layout)
    _check_shapes(traces, 1, layout.nesting)
    return _weigh(traces)


class _Run(NamedTuple):
    """How model and guide are run once, and what is asked of them; see `draw_particles`."""

    layout: Layout
    pathwise: PathwiseRule | None
    handlers: Sequence[Handler]
    particles: int
    in_plate: bool  # of the particles
    linear: bool
    check_guide: CheckGuide | None

    def trace(self, programs: Programs) -> Traces:
        """Traces of the model, replayed against the guide, and of the guide, with their log probabilities."""
        chosen = {h.site: -h.dims - 1 for h in self.handlers if isinstance(h, ChooseValues)}
        guide, args, kwargs = programs.guide, programs.args, programs.kwargs
        for handler in self.handlers:
            guide = handler(guide)
        gated = GateValues(self.pathwise or iwae, chosen)
        guide_trace = run(gated(guide) if self.pathwise is not None else guide, args, kwargs, chosen=chosen)
        pruned_guide = prune_subsample_sites(guide_trace)
        self._check(pruned_guide)
        for name in sorted(chosen.keys() - latents(pruned_guide)):
            found = sorted(latents(pruned_guide))
            raise ValueError(f"site '{name}': expected among the latent sites of the guide, found {found}")
        pruned_guide.compute_score_parts()
        layout = self.layout.of_program(pruned_guide) if latents(pruned_guide) else self.layout
        gates = set_gates(pruned_guide, layout, gated)
        asked = Options()
        model_trace = run(
            poutine.replay(asked(programs.model), trace=drawn_by(guide_trace)), args, kwargs, chosen=chosen
        )
        subsamples = _subsamples(guide_trace, model_trace)
        model_trace = prune_subsample_sites(model_trace)
        layout = self.layout.of_program(pruned_guide, model_trace)
        if self.check_guide is not None:
            self.check_guide(pruned_guide, asked.found)
        check_same_latents(model_trace, pruned_guide)
        check_same_power(model_trace, pruned_guide)
        self._check(model_trace)
        model_trace.compute_log_prob()
        traces = Traces(model_trace, pruned_guide, subsamples, gates, chosen, layout)
        _check_shapes(traces, self.particles, layout.nesting + self.in_plate)
        return traces

    def _check(self, trace: poutine.Trace) -> None:
        check_no_enumeration(trace)
        check_nesting(trace, self.layout.nesting + self.in_plate)
        if not self.linear:
            check_no_inner_subsampling(trace, self.layout)


def _subsamples(*traces: poutine.Trace) -> poutine.Trace:
    """The sites that chose the elements of their plates."""
    found = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in found:
                found.add_node(name, **site.copy())
    return found


def _check_shapes(traces: Traces, particles: int, nesting: int) -> None:
    """Every dimension of every site is declared."""
    nodes: dict[str, Site] = traces.guide.nodes
    leading = {dim: len(nodes[name]["value"]) for name, dim in traces.chosen.items()}
    for site in [*sample_sites(traces.model), *sample_sites(traces.guide)]:
        check_dimensions(site, traces.layout, particles, leading)
        if is_validation_enabled():
            check_site_shape(site, nesting)


def _weigh(traces: Traces) -> Particles:
    """Sum log p - log q and the scores over the sites of each datapoint."""
    layout = traces.layout
    log_p: Tensor | float = 0.0
    log_q: Tensor | float = 0.0  # of the proposal
    log_guide: Tensor | float = 0.0
    log_smooth: Tensor | float = 0.0
    given: Tensor | float = 0.0
    scores: list[SiteScore] = []
    masks: list[Tensor | bool] = []
    scale: float | None = None
    chosen_site: tuple[Layout, Site] | None = None
    for trace in (traces.model, traces.guide):
        for site in sample_sites(trace):
            if trace is traces.guide and site["is_observed"] and not isinstance(site["fn"], Unit):
                continue  # its value is given: nothing was drawn
            scale = same_scale(site, layout.subsampling_scale(site), scale)
            # The handler's scale covers all enclosing plates: take the batch plates' share out again.
            log_prob = layout.per_datapoint(site, site["log_prob"] if scale == 1 else site["log_prob"] / scale)
            if is_validation_enabled() and bool(torch.isnan(log_prob).any()):
                raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
            masks.append(layout.any_per_datapoint(site, mask_of(site).any_in_event()))
            if trace is traces.model:
                log_p = log_p + log_prob
            elif site["name"] in traces.chosen:
                check_batch_plates_only(site, layout)
                chosen_site = (layout, site)
                sampled = layout.per_datapoint(site, site["fn"].log_prob(site["value"]))
                given = given + sampled
                log_q = log_q + _but_sampled(site, layout, scale)
            else:
                log_q = log_q + log_prob
                log_guide = log_guide + _of_the_guide(site, layout, log_prob, scale)
                if is_reparameterised(site):
                    log_smooth = log_smooth + log_prob
                else:
                    score = layout.per_datapoint(site, score_of(site))
                    scores.append(SiteScore(site["name"], score, site["infer"].get("estimator"), layout, site))
    if not isinstance(log_p, Tensor) and not isinstance(log_q, Tensor):
        raise ValueError("model: expected at least one sample site in the batch plates, found none")
    log_w = torch.as_tensor(log_p - log_q)
    shape = log_w.shape
    batch = shape[layout.leading + 1 :]
    unmasked = any(mask is True for mask in masks)
    live = torch.full(shape, unmasked, device=log_w.device)
    if not unmasked:
        for mask in masks:
            live = live | torch.as_tensor(mask, device=log_w.device)
        scores = [s._replace(log_prob=torch.where(live, s.log_prob, 0.0)) for s in scores]

    def flat(values: Tensor | float) -> Tensor:
        values = torch.as_tensor(values, dtype=log_w.dtype, device=log_w.device)
        return values.expand(shape).reshape(*shape[: layout.leading + 1], -1)

    return Particles(
        flat(log_w),
        flat(log_p),
        flat(log_guide),
        flat(log_q),
        flat(log_smooth),
        tuple(s._replace(log_prob=flat(s.log_prob)) for s in scores),
        flat(given),
        live.reshape(*shape[: layout.leading + 1], -1),
        scale or 1.0,
        batch,
        tuple(SiteGate(0, log_w.shape[layout.leading], gate) for gate in traces.gates),
        traces.subsamples,
        layout,
        (traces.guide,),
        chosen_site,
    )


def _of_the_guide(site: Site, layout: Layout, log_prob: Tensor, scale: float) -> Tensor:
    """log q of a guide's site, also where it was drawn from a proposal around q."""
    if not isinstance(site["fn"], Defended):
        return log_prob
    own = scale_and_mask(site["fn"].guide.log_prob(site["value"]), site["scale"], site["mask"])
    return layout.per_datapoint(site, own / scale)


def _but_sampled(site: Site, layout: Layout, scale: float) -> Tensor:
    """log q^s - log q of a site with given values: nothing for s = 1, even where q is zero."""
    power, _ = power_of(site, layout)  # it has no mask of its own, see `check_no_own_mask`
    log_q = site["fn"].log_prob(site["value"])
    return layout.per_datapoint(site, torch.where(power == 1, 0.0, (power - 1) * log_q))
