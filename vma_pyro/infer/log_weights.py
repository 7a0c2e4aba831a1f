"""From traces to log weights per datapoint: where Pyro's traces are taken apart.

A particle k of datapoint b weighs log w = log p(x, latents) - log q(latents), summed over the sites of b. A site
belongs to datapoint b when it lies in the batch plates; a site outside them belongs to no datapoint and is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from vma_pyro.infer.checks import (
    check_batch_plates_only,
    check_nesting,
    check_no_enumeration,
    check_same_latents,
    is_reparameterised,
    latents,
    same_scale,
)
from vma_pyro.infer.gates import Gate, power_of, set_gates
from vma_pyro.infer.handlers import ChooseValues, Defended, fixed
from vma_pyro.infer.particles import Particles, SiteGate, SiteScore, concatenate
from vma_pyro.infer.pathwise import PathwiseRule, iwae
from vma_pyro.infer.plates import Layout, Program, Site, particle_plate, sample_sites

Handler = Callable[[Program], Program]


class Traces(NamedTuple):
    """One run of model and guide.

    Attributes:
        model, guide: with log probabilities.
        subsamples: the sites that chose the elements of their plates.
        gates: of the guide's reparameterised sites.
        chosen: names of the sites with given values.
    """

    model: poutine.Trace
    guide: poutine.Trace
    subsamples: poutine.Trace
    gates: tuple[Gate, ...]
    chosen: frozenset[str]


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
) -> Particles:
    """Run the guide K times and the model against it.

    Args:
        model, guide: any Pyro programs with the same latent sites.
        args, kwargs: arguments of both.
        num_particles: K.
        batch_plates: names of the plates whose elements are the datapoints, outermost dimension of B first.
        max_plate_nesting: number of plate dimensions that model and guide use.
        vectorize: run once, with a particle plate at dimension -max_plate_nesting - 1; else K times.
        pathwise: rule of reparameterised sites that name none with `infer={"estimator": ...}`; None: `iwae`
            even of those that do.
        handlers: effect handlers around the guide, which see its sites with all plates.
        given: sites whose values are chosen instead of drawn; the first is at the leftmost dimension. Their weight
            is q w, so that a sum over all values is an expectation under q.

    Raises:
        ValueError: a site outside the batch plates, a site of the model that the guide lacks or the reverse, a
            site left for enumeration, an estimator that does not fit its site, NaN in a weight.
    """
    kwargs = kwargs or {}
    handlers = [*handlers, *given]
    layout = Layout(tuple(batch_plates), max_plate_nesting, len(given))
    if vectorize or num_particles == 1:
        if num_particles > 1:
            plate = particle_plate(num_particles, max_plate_nesting)
            model, guide = plate(model), plate(guide)
        traces = _trace(model, guide, args, kwargs, layout, pathwise, handlers, vectorized=num_particles > 1)
        return _weigh(traces, layout)
    runs = []
    for _ in range(num_particles):
        traces = _trace(model, guide, args, kwargs, layout, pathwise, handlers, vectorized=False)
        runs.append(_weigh(traces, layout))
        if len(runs) == 1:
            # A randomly subsampled plate must show all particles the same datapoints.
            guide = poutine.replay(guide, trace=traces.subsamples)
            model = poutine.replay(model, trace=traces.subsamples)
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
    return draw_particles(
        model,
        guide,
        args,
        kwargs,
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
    plate = particle_plate(num_particles, max_plate_nesting)
    traces = _trace(plate(model), plate(guide), args, kwargs or {}, layout, iwae, together, vectorized=True)
    return _weigh(traces, layout).log_weights


def run(program: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> poutine.Trace:
    """The trace of a program, whose errors keep to their one line: Pyro adds the shapes of all its sites."""
    try:
        return poutine.trace(program).get_trace(*args, **kwargs)
    except ValueError as error:
        if isinstance(error.__cause__, ValueError) and str(error).startswith(str(error.__cause__)):
            raise error.__cause__ from None
        raise


def guide_log_prob(
    guide: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    batch_plates: Sequence[str],
    max_plate_nesting: int,
) -> Float[Tensor, "1 B"]:
    """log q of the latents of one run of the guide, which may be replayed."""
    layout = Layout(tuple(batch_plates), max_plate_nesting)
    trace = prune_subsample_sites(run(guide, args, kwargs))
    trace.compute_score_parts()
    empty = poutine.Trace()
    return _weigh(Traces(empty, trace, empty, (), frozenset()), layout).log_q


def model_log_prob(
    model: Program,
    latents: poutine.Trace,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    batch_plates: Sequence[str],
    max_plate_nesting: int,
) -> Float[Tensor, "1 B"]:
    """log p(x, latents) of given values of the latent sites."""
    layout = Layout(tuple(batch_plates), max_plate_nesting)
    trace = prune_subsample_sites(run(poutine.replay(model, trace=latents), args, kwargs))
    trace.compute_log_prob()
    empty = poutine.Trace()
    return _weigh(Traces(trace, empty, empty, (), frozenset()), layout).log_p


def _trace(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    layout: Layout,
    pathwise: PathwiseRule | None,
    handlers: Sequence[Handler],
    *,
    vectorized: bool,
) -> Traces:
    """Traces of the model, replayed against the guide, and of the guide, with their log probabilities."""
    nesting = layout.nesting + vectorized
    for handler in handlers:
        guide = handler(guide)
    guide_trace = run(guide, args, kwargs)
    chosen = {h.site: h for h in handlers if isinstance(h, ChooseValues)}
    pruned_guide = prune_subsample_sites(guide_trace)
    check_no_enumeration(pruned_guide)
    for name in chosen:
        if name not in latents(pruned_guide):
            found = sorted(latents(pruned_guide))
            raise ValueError(f"site '{name}': expected among the latent sites of the guide, found {found}")
    check_nesting(pruned_guide, nesting)
    pruned_guide.compute_score_parts()
    gates = set_gates(pruned_guide, layout, pathwise, chosen)  # the model sees the values behind the gates
    model_trace = run(poutine.replay(model, trace=guide_trace), args, kwargs)
    subsamples = poutine.Trace()
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in subsamples:
                subsamples.add_node(name, **site.copy())
    model_trace = prune_subsample_sites(model_trace)
    check_same_latents(model_trace, pruned_guide)
    check_nesting(model_trace, nesting)
    model_trace.compute_log_prob()
    if is_validation_enabled():
        for site in [*sample_sites(model_trace), *sample_sites(pruned_guide)]:
            check_site_shape(site, nesting)
    return Traces(model_trace, pruned_guide, subsamples, gates, frozenset(chosen))


def _weigh(traces: Traces, layout: Layout) -> Particles:
    """Sum log p - log q and the scores over the sites of each datapoint."""
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
            scale = same_scale(site, layout.subsampling_scale(site), scale)
            # The handler's scale covers all enclosing plates: take the batch plates' share out again.
            log_prob = layout.per_datapoint(site, site["log_prob"] if scale == 1 else site["log_prob"] / scale)
            if is_validation_enabled() and bool(torch.isnan(log_prob).any()):
                raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
            masks.append(layout.unmasked(site))
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
                elif not site["is_observed"] or isinstance(site["fn"], Unit):  # else nothing was drawn
                    score = layout.per_datapoint(site, site["score_parts"].score_function)
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
        return values.expand(shape).flatten(layout.leading + 1)

    return Particles(
        flat(log_w),
        flat(log_p),
        flat(log_guide),
        flat(log_q),
        flat(log_smooth),
        tuple(s._replace(log_prob=flat(s.log_prob)) for s in scores),
        flat(given),
        live.flatten(layout.leading + 1),
        scale or 1.0,
        batch,
        tuple(SiteGate(0, log_w.shape[layout.leading], gate) for gate in traces.gates),
        traces.subsamples,
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
    power = power_of(site, layout)
    log_q = site["fn"].log_prob(site["value"])
    return layout.per_datapoint(site, torch.where(power == 1, 0.0, (power - 1) * log_q))
