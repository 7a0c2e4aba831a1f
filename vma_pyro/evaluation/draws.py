"""Draws of the guide with the model at their values: what an evaluation site by site takes apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.evaluation.checks import BATCH_PLATES, check_pair, check_plate, weigh
from vma_pyro.evaluation.estimates import undisturbed
from vma_pyro.infer.engine.checks import check_nesting, same_scale
from vma_pyro.infer.engine.plates import PARTICLES, Layout, Site, particle_plate, sample_sites
from vma_pyro.infer.engine.plates import PyroProgram as Program
from vma_pyro.infer.engine.running import run


class Draws(NamedTuple):
    """Draws of the guide, and the model at their values.

    Attributes:
        guide, model: without the sites of subsampling; with log probabilities if nothing is enumerated.
        layout: where these have draws and datapoints.
        own_dims: site of the guide to the number of batch dimensions of its distribution as the program wrote it.
            (The plate of the draws gives all of them a dimension.) None for one draw without a plate.
    """

    guide: poutine.Trace
    model: poutine.Trace
    layout: Layout
    own_dims: dict[str, int] | None

    def per_datapoint(self, site: Site, values: Tensor) -> Tensor:
        """What has a site's dimensions, as it stands in the bound of each datapoint [*enumerated, K, *batch]."""
        # The scale of a subsampled plate multiplies the bound of all of its datapoints.
        scale = self.layout.subsampling_scale(site)
        found = self.layout.per_datapoint(site, values)
        return found if scale == 1 else found / scale

    def depends_on_a_draw(self, name: str) -> bool:
        """Whether the guide's distribution, mask or scale at a site depends on a draw: it has their dimension."""
        if self.own_dims is None:
            return bool(before(self.guide, name))
        return self.own_dims[name] > self.layout.nesting or self._marked(self.guide.nodes[name])

    def prior_depends_on_a_draw(self, name: str) -> bool:
        """The same of the model, where the values are given and no plate gives a distribution more dimensions."""
        site: Site = self.model.nodes[name]
        if self.own_dims is None:
            return bool(before(self.model, name))
        return len(site["fn"].batch_shape) > self.layout.nesting or self._marked(site)

    def prior_knows_no_more(self, name: str) -> bool:
        """Whether the model's distribution can depend only on what the guide, too, has drawn before the site."""
        return not self.prior_depends_on_a_draw(name) or before(self.model, name) <= before(self.guide, name)

    def _marked(self, site: Site) -> bool:
        marks = (site["mask"], site["scale"])
        return any(isinstance(mark, Tensor) and mark.dim() > self.layout.nesting for mark in marks)


def draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int,
    nesting: int | None,
    enumerated: Sequence[str] = (),
) -> Draws:
    """Run the guide K times, side by side, and the model at its values.

    Args:
        model, guide: programs of (memory, x).
        memory, x: as everywhere.
        num_samples: K.
        nesting: number of plate dimensions of the programs, see `nesting_of`; None for a single draw, without a
            plate of its own. (What depends on it is then not told from what only comes after it.)
        enumerated: sites of the guide that take all their values, in a dimension each left of the draws'.

    Raises:
        ValueError: a site outside the plate `data`, or of one program only; a plate of another size than x.
    """
    own_dims: dict[str, int] | None = None
    if nesting is None:
        guide_trace, model_trace = _one_run(model, guide, memory, x)
        nesting = plate_dims(guide_trace, model_trace)
    else:
        guide_trace, own_dims = draw_guide(guide, memory, x, num_samples, nesting, enumerated)
        plate = particle_plate(num_samples, nesting)
        replayed = poutine.replay(model, trace=_without_given(guide_trace))
        model_trace = prune_subsample_sites(_side_by_side(plate, replayed, memory, x)[0])
        guide_trace = prune_subsample_sites(guide_trace)
        check_pair(model_trace, guide_trace)
    layout = Layout(BATCH_PLATES, nesting, len(enumerated))
    scale: float | None = None
    for trace in (guide_trace, model_trace):
        check_nesting(trace, nesting + 1)
        for site in sample_sites(trace):
            check_plate(site, len(x))
            scale = same_scale(site, layout.subsampling_scale(site), scale)
        if not enumerated:
            weigh(trace)
    return Draws(guide_trace, model_trace, layout, own_dims)


def draw_guide(
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    num_samples: int,
    nesting: int,
    enumerated: Sequence[str] = (),
) -> tuple[poutine.Trace, dict[str, int]]:
    """The trace of K runs of the guide, and `own_dims` as in `Draws`."""
    plate = particle_plate(num_samples, nesting)
    if not enumerated:
        return _side_by_side(plate, guide, memory, x)

    def how(site: Site) -> Any:
        return {"enumerate": "parallel" if site["name"] in enumerated else None}

    def all_values(program: Program) -> Program:
        marked = poutine.infer_config(plate(program), config_fn=how)
        return poutine.enum(marked, first_available_dim=-nesting - 2)

    return _side_by_side(all_values, guide, memory, x)


def nesting_of(model: Callable[..., Any], guide: Callable[..., Any], memory: Any, x: Tensor) -> int:
    """Number of plate dimensions of two programs, by one run that leaves no trace behind."""
    with undisturbed(seed=0), poutine.block():
        guide_trace, model_trace = _one_run(model, guide, memory, x)
    # Without draws, none of them passes for a dimension that no plate declares.
    weigh(guide_trace)
    weigh(model_trace)
    return plate_dims(guide_trace, model_trace)


def trace_guide(guide: Callable[..., Any], memory: Any, x: Tensor) -> poutine.Trace:
    """The trace of one run of the guide, without any plate of draws."""
    return _side_by_side(lambda program: program, guide, memory, x)[0]


def ending_at(name: str, guide: Program) -> Program:
    """The same guide up to the site that it draws under this name: what comes later has no say in it."""

    def ended(*args: Any, **kwargs: Any) -> Any:
        try:
            with _End(name):
                return guide(*args, **kwargs)
        except _Reached:
            return None

    return ended


def _one_run(
    model: Callable[..., Any], guide: Callable[..., Any], memory: Any, x: Tensor
) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of the guide and of the model at its values, without any plate of draws."""
    guide_trace = trace_guide(guide, memory, x)
    replayed = poutine.replay(model, trace=_without_given(guide_trace))
    model_trace = _side_by_side(lambda program: program, replayed, memory, x)[0]
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    check_pair(model_trace, guide_trace)
    return guide_trace, model_trace


def plate_dims(*traces: poutine.Trace) -> int:
    """The largest plate dimension of any site, counted from the right; 1 or more."""
    sites = [site for trace in traces for site in sample_sites(trace)]
    return max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=1)


def before(trace: poutine.Trace, name: str) -> set[str]:
    """Names of the random sites before a site."""
    names = [site["name"] for site in sample_sites(trace) if site["name"] == name or not site["is_observed"]]
    return set(names[: names.index(name)])


def plates_of(site: Site) -> dict[str, int]:
    """The plates of a site, but for that of the draws, and their dimensions."""
    return {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}


def _side_by_side(
    around: Callable[[Program], Program], program: Program, memory: Any, x: Tensor
) -> tuple[poutine.Trace, dict[str, int]]:
    """The trace of a program with handlers around it, and the batch dimensions that it gave its distributions.

    Raises:
        ValueError: a program that asks for the value of one draw, as `if` does, where there are several.
    """
    own = _OwnDims()
    try:
        return run(around(own(program)), (memory, x), {}), own.dims
    except ValueError as error:
        if not str(error).startswith("vectorize_particles:"):
            raise
        reason = str(error.__cause__).partition("\n")[0]
        raise ValueError(
            f"site '{next(reversed(own.dims), None)}': expected all draws and datapoints side by side, but after "
            f"it the program asks for a single value ({reason}); use poutine.mask for sites under a condition"
        ) from None


class _OwnDims(Messenger):
    """Inside the plate of the draws: remembers the distributions as they are without it."""

    def __init__(self) -> None:
        super().__init__()
        self.dims: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.dims[msg["name"]] = len(getattr(msg["fn"], "batch_shape", ()))


class _Reached(Exception):
    """The site that a program is to end at has been drawn."""


class _End(Messenger):
    """Inside of all that looks at a site: ends the program after it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not msg["is_observed"]:
            raise _Reached


def _without_given(guide_trace: poutine.Trace) -> poutine.Trace:
    """What the guide has drawn; the model does without values that the guide was given itself."""
    drawn = poutine.Trace()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"]:
            drawn.add_node(name, **site.copy())
    return drawn
