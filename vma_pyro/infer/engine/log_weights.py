"""Weighted draws of a guide, with one weight per datapoint: what callers of the engine use.

Particle k of datapoint b weighs log w = log p(x, latents) - log q(latents), summed over the sites of b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.infer.engine.first_look import look
from vma_pyro.infer.engine.handlers import EnumerateValues, fixed
from vma_pyro.infer.engine.particles import Particles, concatenate
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.plates import Layout, PyroProgram, particle_plate, sample_sites
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.engine.running import run
from vma_pyro.infer.engine.tracing import CheckGuide, Run, check_shapes
from vma_pyro.infer.engine.weighing import Sites, sum_guide, sum_log_prob, sum_model, weigh


class DrawOptions(TypedDict, total=False):
    """Options of a draw, explained at `draw_particles`."""

    batch_plates: Sequence[str]
    max_plate_nesting: int
    vectorize: bool
    pathwise: PathwiseRule | None
    handlers: Sequence[Handler]
    linear: bool


def draw_particles(
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    **options: Unpack[DrawOptions],
) -> Particles:
    """Run the guide K times and the model against it.

    Args:
        model, guide: any Pyro programs with the same latent sites.
        args, kwargs: arguments of both; a guide may prepare them, see `Programs`.
        num_particles: K.
        batch_plates: names of the plates whose elements are the datapoints, outermost dimension of B first;
            default `("data",)`. With none the whole program is one datapoint, as is a program without plates.
        max_plate_nesting: number of plate dimensions that model and guide use; default 1.
        vectorize: run once, with a particle plate at dimension -max_plate_nesting - 1 (default), or K times.
        pathwise: rule of reparameterised sites that name none with `infer={"estimator": ...}`; default `iwae`.
            None: `iwae`, also for those that name another.
        handlers: effect handlers around the guide, which see its sites with all plates; default none.
        linear: whether log weights are averaged, and not weights: then plates inside the datapoints may be
            subsampled. Default False.

    Raises:
        ValueError: a site outside the batch plates, a site of the model that the guide lacks or the reverse, a
            latent whose mask or scale differs between the two, a dimension that no plate declares, a site left for
            enumeration, an estimator that does not fit its site, NaN in a weight.
    """
    programs = Programs(model, guide, args, kwargs or {}).prepared()
    return draw(programs, num_particles=num_particles, **options)


def log_weights(
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    **options: Unpack[DrawOptions],
) -> Float[Tensor, "K B"]:
    """Draw K times from the guide and return log w [K, B]; see `draw_particles`."""
    programs = Programs(model, guide, args, kwargs or {}).prepared()
    if num_particles > 1:
        look.check(programs, options.get("max_plate_nesting", 1))
    return draw(programs, num_particles=num_particles, **options).log_weights


def log_weights_given(
    values: dict[str, Tensor],
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_particles: int,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int = 1,
) -> Float[Tensor, "S K B"]:
    """Fix a latent site to S values, instead of drawing it, and return log q(values) w [S, K, B].

    q(values) w = p(x, values, rest) / q(rest | values): summed over all values of a discrete site, it estimates
    the marginal likelihood with that site summed exactly and the rest drawn.

    Args:
        values: from the name of a latent site to its values [S]; several sites are fixed together, value by
            value. The other arguments are those of `draw_particles`.
    """
    programs = Programs(model, guide, args, kwargs or {}).prepared()
    programs = programs.under(particle_plate(num_particles, max_plate_nesting))
    together = [EnumerateValues(name, fixed(value), max_plate_nesting + 1) for name, value in values.items()]
    layout = Layout(tuple(batch_plates), max_plate_nesting, 1)
    return weigh(Run(layout, num_particles, True, handlers=together).trace(programs)).log_weights


def draw(
    programs: Programs,
    *,
    num_particles: int,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int = 1,
    vectorize: bool = True,
    pathwise: PathwiseRule | None = iwae,
    handlers: Sequence[Handler] = (),
    enumerated: Sequence[EnumerateValues] = (),
    linear: bool = False,
    check_guide: CheckGuide | None = None,
    in_plate: bool = False,
) -> Particles:
    """Run the guide K times and the model against it; see `draw_particles`.

    Args:
        programs: programs with arguments that the guide has prepared.
        enumerated: sites whose values are enumerated instead of drawn; the first is at the leftmost dimension.
            Their weight is q w, so that a sum over all values is an expectation under q.
        check_guide: refuses what sites ask for and cannot have.
        in_plate: put a single particle into a plate as well, where a site shows whether earlier draws decide it.
    """
    in_plate = in_plate or num_particles > 1
    layout = Layout(tuple(batch_plates), max_plate_nesting, len(enumerated))
    once = Run(
        layout,
        num_particles,
        in_plate,
        pathwise=pathwise,
        handlers=[*handlers, *enumerated],
        linear=linear or (num_particles == 1 and not enumerated),
        check_guide=check_guide,
    )
    if not in_plate:
        return weigh(once.trace(programs))
    if vectorize:
        return weigh(once.trace(programs.under(particle_plate(num_particles, max_plate_nesting))))
    alone = once._replace(particles=1, in_plate=False)
    runs: list[Particles] = []
    for _ in range(num_particles):
        runs.append(weigh(alone.trace(programs)))
        if len(runs) == 1:
            programs = programs.with_subsamples(runs[0].subsamples)
    return concatenate(runs)


def guide_log_prob(
    guide: PyroProgram, args: Sequence[Any], kwargs: Mapping[str, Any], layout: Layout
) -> Float[Tensor, "1 B"]:
    """Run a guide, which may be replayed, and return log q of its latents."""
    trace = prune_subsample_sites(run(guide, args, kwargs))
    trace.compute_score_parts()
    check_shapes(sample_sites(trace), layout, 1, {}, nesting=layout.nesting)
    return sum_log_prob(sum_guide(trace, Sites(layout)).log_q, layout)


def model_log_prob(programs: Programs, latents: poutine.Trace, layout: Layout) -> Float[Tensor, "1 B"]:
    """Compute log p(x, latents) of given values of the latent sites."""
    replayed = poutine.replay(programs.model, trace=latents)
    trace = prune_subsample_sites(run(replayed, programs.args, programs.kwargs))
    trace.compute_log_prob()
    check_shapes(sample_sites(trace), layout, 1, {}, nesting=layout.nesting)
    return sum_log_prob(sum_model(trace, Sites(layout)), layout)
