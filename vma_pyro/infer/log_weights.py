"""From traces to log weights per datapoint: the only file that takes Pyro's traces apart.

A particle k of datapoint b weighs log w = log p(x, latents) - log q(latents), summed over the sites of b. A site
belongs to datapoint b when it lies in the batch plates; a site outside them belongs to no datapoint and is
refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

Program = Callable[..., Any]
Site = Any  # a node of a trace; Pyro's own type leaves most of its fields open


class Particles(NamedTuple):
    """K weighted draws of the guide for each of B datapoints.

    Attributes:
        log_weights: log w [K, B], differentiable in the parameters of the model, in those of the guide inside
            log q, and through reparameterised values.
        score: sum of log q over the guide's sites that are not reparameterised [K, B]; zero for a datapoint whose
            sites are all masked. Neither masks of single sites nor scales enter: they change the weight of a
            draw, not the probability of drawing it.
        scale: full size over subsample size of the batch plates, which multiplies the bound.
    """

    log_weights: Float[Tensor, "K B"]
    score: Float[Tensor, "K B"]
    scale: float


class Traces(NamedTuple):
    """One run of model and guide; `subsamples` holds the sites that chose the elements of their plates."""

    model: poutine.Trace
    guide: poutine.Trace
    subsamples: poutine.Trace


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
) -> Particles:
    """Run the guide K times and the model against it.

    Args:
        model, guide: any Pyro programs with the same latent sites.
        args, kwargs: arguments of both.
        num_particles: K.
        batch_plates: names of the plates whose elements are the datapoints, outermost dimension of B first.
        max_plate_nesting: number of plate dimensions that model and guide use.
        vectorize: run once, with a particle plate at dimension -max_plate_nesting - 1; else K times.

    Raises:
        ValueError: a site outside the batch plates, a site of the model that the guide lacks or the reverse, a
            site left for enumeration, NaN in a weight.
    """
    kwargs = kwargs or {}
    if vectorize or num_particles == 1:
        if num_particles > 1:
            plate = _particle_plate(num_particles, max_plate_nesting)
            model, guide = plate(model), plate(guide)
        nesting = max_plate_nesting + (num_particles > 1)
        traces = _trace(model, guide, args, kwargs, nesting)
        return _weigh(traces, batch_plates, max_plate_nesting)
    runs = []
    for _ in range(num_particles):
        traces = _trace(model, guide, args, kwargs, max_plate_nesting)
        runs.append(_weigh(traces, batch_plates, max_plate_nesting))
        if len(runs) == 1:
            # A randomly subsampled plate must show all particles the same datapoints.
            guide = poutine.replay(guide, trace=traces.subsamples)
            model = poutine.replay(model, trace=traces.subsamples)
    return Particles(
        torch.cat([run.log_weights for run in runs]), torch.cat([run.score for run in runs]), runs[0].scale
    )


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
    """log w [S, K, B] with some latent sites fixed to S values each, instead of drawn.

    log w = log p(x, values, rest) - log q(rest | values): summed over all values of a discrete site, w estimates
    the marginal likelihood with that site summed exactly and the rest drawn.

    Args:
        values: name of a latent site to its values [S]; the other arguments are those of `draw_particles`.
    """
    kwargs = kwargs or {}
    plate = _particle_plate(num_particles, max_plate_nesting)
    lead = (1,) * (max_plate_nesting + 1)
    fixed = {name: value.reshape(-1, *lead) for name, value in values.items()}
    guide_trace = poutine.trace(plate(poutine.condition(guide, fixed))).get_trace(*args, **kwargs)
    model = poutine.replay(poutine.condition(model, fixed), trace=guide_trace)
    model_trace = poutine.trace(plate(model)).get_trace(*args, **kwargs)
    for name in fixed:
        if name not in guide_trace.nodes or name not in model_trace.nodes:
            raise ValueError(
                f"site '{name}': expected in both model and guide, guide has {sorted(guide_trace.nodes)}"
            )
    _check_same_latents(model_trace, guide_trace)
    traces = Traces(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), poutine.Trace())
    traces.model.compute_log_prob()
    traces.guide.compute_score_parts()
    return _weigh(traces, batch_plates, max_plate_nesting, given=fixed).log_weights


def _particle_plate(num_particles: int, max_plate_nesting: int) -> Callable[[Program], Program]:
    return pyro.plate("num_particles_vectorized", num_particles, dim=-max_plate_nesting - 1)


class PlateNesting:
    """Guesses the number of plate dimensions by one run of model and guide, which leaves no trace behind.

    The guess is kept per pair of programs, not per objective: one objective may serve several programs.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], int]] = weakref.WeakKeyDictionary()

    def __call__(self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        """The largest plate dimension, counted from the right, over the sites of both programs."""
        try:
            guide_ref, nesting = self._known[model]
            if guide_ref() is guide:
                return nesting
        except (KeyError, TypeError):
            pass
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        frames = (
            frame
            for trace in (model_trace, guide_trace)
            for site in _sample_sites(prune_subsample_sites(trace))
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        )
        nesting = max((-frame.dim for frame in frames), default=0)
        with suppress(TypeError):  # a callable without weak references is guessed anew each time
            self._known[model] = (weakref.ref(guide), nesting)
        return nesting


def _trace(model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any], nesting: int) -> Traces:
    """Traces of the model, replayed against the guide, and of the guide, with their log probabilities."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    subsamples = poutine.Trace()
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in subsamples:
                subsamples.add_node(name, **site.copy())
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    _check_same_latents(model_trace, guide_trace)
    _check_nesting(guide_trace, nesting)
    _check_nesting(model_trace, nesting)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for site in [*_sample_sites(model_trace), *_sample_sites(guide_trace)]:
            check_site_shape(site, nesting)
    return Traces(model_trace, guide_trace, subsamples)


def _sample_sites(trace: poutine.Trace) -> Iterable[Site]:
    """The random sites, observed or not; `pyro.deterministic` is not random."""
    nodes: Iterable[Site] = trace.nodes.values()
    for site in nodes:
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield site


def _latents(trace: poutine.Trace) -> set[str]:
    return {site["name"] for site in _sample_sites(trace) if not site["is_observed"]}


def _check_same_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    for site in _sample_sites(guide_trace):
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"site '{site['name']}': expected a site to sample, but it is marked for enumeration "
                f"({site['infer']['enumerate']!r}); remove the mark or use TraceEnum_ELBO"
            )
    auxiliary = {s["name"] for s in _sample_sites(guide_trace) if s["infer"].get("is_auxiliary")}
    in_model, in_guide = _latents(model_trace), _latents(guide_trace)
    for name in sorted(in_model - in_guide):
        raise ValueError(f"site '{name}': expected in the guide as in the model, guide has {sorted(in_guide)}")
    for name in sorted(in_guide - in_model - auxiliary):
        raise ValueError(f"site '{name}': expected in the model as in the guide, model has {sorted(in_model)}")


def _check_nesting(trace: poutine.Trace, nesting: int) -> None:
    for site in _sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and -frame.dim > nesting:
                raise ValueError(
                    f"max_plate_nesting: expected at least {-frame.dim}, as plate '{frame.name}' of site "
                    f"'{site['name']}' is at dimension {frame.dim}, got {nesting}"
                )


def _weigh(
    traces: Traces,
    batch_plates: Sequence[str],
    max_plate_nesting: int,
    *,
    given: Collection[str] = (),
) -> Particles:
    """Sum log p - log q and the scores over the sites of each datapoint.

    Given sites take the leftmost dimension, and are left out of log q.
    """
    leading = int(bool(given))
    layout = _Layout(tuple(batch_plates), max_plate_nesting, leading)
    log_w: Tensor | float = 0.0
    score: Tensor | float = 0.0
    masks: list[Tensor | bool] = []
    scale: float | None = None
    for sign, trace in ((1, traces.model), (-1, traces.guide)):
        for site in _sample_sites(trace):
            site_scale = layout.subsampling_scale(site)
            if scale is not None and abs(site_scale - scale) > 1e-9 * scale:
                raise ValueError(
                    f"site '{site['name']}': expected subsampling scale {scale} in its batch plates as at the "
                    f"other sites, got {site_scale}"
                )
            scale = site_scale
            if sign == -1 and site["name"] in given:
                continue
            # The handler's scale covers all enclosing plates: take the batch plates' share out again.
            log_prob = layout.per_datapoint(site, site["log_prob"] / site_scale)
            if is_validation_enabled() and bool(torch.isnan(log_prob).any()):
                raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
            log_w = log_w + sign * log_prob
            masks.append(layout.unmasked(site))
            if sign == -1:
                score_function = site["score_parts"].score_function
                if isinstance(score_function, Tensor):
                    score = score + layout.per_datapoint(site, score_function)
    if not isinstance(log_w, Tensor):
        raise ValueError("model: expected at least one sample site in the batch plates, found none")
    shape = log_w.shape
    score = score.expand(shape) if isinstance(score, Tensor) else torch.zeros_like(log_w)
    if not any(mask is True for mask in masks):
        live = [torch.as_tensor(mask, device=log_w.device).expand(shape) for mask in masks]
        score = torch.where(torch.stack(live).any(0), score, 0.0)
    return Particles(log_w.flatten(1 + leading), score.flatten(1 + leading), scale or 1.0)


class _Layout:
    """Where a site's log probability holds particles, datapoints, and everything to be summed."""

    def __init__(self, batch_plates: tuple[str, ...], max_plate_nesting: int, leading: int) -> None:
        self.batch_plates, self.nesting, self.leading = batch_plates, max_plate_nesting, leading

    def _frames(self, site: Site) -> list[Any]:
        """The frames of the batch plates, in the order in which they were named."""
        frames = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        missing = [name for name in self.batch_plates if name not in frames]
        if missing:
            inside = sorted(set(frames) - {"num_particles_vectorized"})
            raise ValueError(
                f"site '{site['name']}': expected inside the batch plates {list(self.batch_plates)}, "
                f"found in {inside}; its log weight belongs to no single datapoint"
            )
        return [frames[name] for name in self.batch_plates]

    def subsampling_scale(self, site: Site) -> float:
        """Full size over subsample size, over the batch plates."""
        scale = 1.0
        for frame in self._frames(site):
            scale *= (frame.full_size or frame.size) / frame.size
        return scale

    def per_datapoint(self, site: Site, log_prob: Tensor) -> Tensor:
        """Sum over all but [leading, particle, batch plates]; returns [..., K, *batch]."""
        return self._kept(site, log_prob, lambda value, dims: value.sum(dims) if dims else value)

    def unmasked(self, site: Site) -> Tensor | bool:
        """Whether any part of the site counts: a boolean, or one that broadcasts to [..., K, *batch]."""
        mask = site["mask"]
        if not isinstance(mask, Tensor):
            return mask is not False
        return self._kept(site, mask, lambda value, dims: value.amax(dims) if dims else value)

    def _kept(self, site: Site, value: Tensor, reduce: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        dims = [frame.dim for frame in self._frames(site)]
        rank = self.nesting + 1 + self.leading  # [leading, particle, plates]
        value = value.reshape((1,) * (rank - value.dim()) + value.shape)
        lead = list(range(1 + self.leading))
        batch = [rank + dim for dim in dims]
        rest = [d for d in range(1 + self.leading, rank) if d not in batch]
        return reduce(value.permute(*lead, *batch, *rest), list(range(len(lead) + len(batch), rank)))
