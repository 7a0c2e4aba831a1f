"""Drawing the particles of prepared programs, and log probabilities of single runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.infer.engine.enumeration import EnumerateValues
from vma_pyro.infer.engine.particles import Particles, concatenate
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.plates import Layout, PyroProgram, particle_plate, sample_sites
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.engine.running import run
from vma_pyro.infer.engine.tracing import CheckGuide, Run, check_shapes
from vma_pyro.infer.engine.weighing import Sites, sum_guide, sum_log_prob, sum_model, weigh


def draw(
    programs: Programs,
    *,
    num_particles: int,
    batch_plates: Sequence[str],
    max_plate_nesting: int,
    vectorize: bool = True,
    pathwise: PathwiseRule | None = iwae,
    handlers: Sequence[Handler] = (),
    enumerated: Sequence[EnumerateValues] = (),
    linear: bool = False,
    check_guide: CheckGuide | None = None,
) -> Particles:
    """Run the guide K times and the model against it; see `draw_particles`.

    Args:
        programs: with arguments that the guide has prepared.
        num_particles, batch_plates, max_plate_nesting, vectorize, pathwise, handlers, linear: those of
            `draw_particles`.
        enumerated: sites whose values are enumerated instead of drawn; the first is at the leftmost dimension.
            Their weight is q w, so that a sum over all values is an expectation under q.
        check_guide: refuses what sites ask for and cannot have.
    """
    layout = Layout(tuple(batch_plates), max_plate_nesting, len(enumerated))
    once = Run(
        layout,
        num_particles,
        num_particles > 1,
        pathwise=pathwise,
        handlers=[*handlers, *enumerated],
        linear=linear or (num_particles == 1 and not enumerated),
        check_guide=check_guide,
    )
    if num_particles == 1:
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
    """log q of the latents of one run of the guide, which may be replayed."""
    trace = prune_subsample_sites(run(guide, args, kwargs))
    trace.compute_score_parts()
    check_shapes(sample_sites(trace), layout, 1, {}, nesting=layout.nesting)
    return sum_log_prob(sum_guide(trace, Sites(layout)).log_q, layout)


def model_log_prob(programs: Programs, latents: poutine.Trace, layout: Layout) -> Float[Tensor, "1 B"]:
    """log p(x, latents) of given values of the latent sites."""
    replayed = poutine.replay(programs.model, trace=latents)
    trace = prune_subsample_sites(run(replayed, programs.args, programs.kwargs))
    trace.compute_log_prob()
    check_shapes(sample_sites(trace), layout, 1, {}, nesting=layout.nesting)
    return sum_log_prob(sum_model(trace, Sites(layout)), layout)
