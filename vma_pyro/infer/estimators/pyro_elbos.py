"""Pyro's own single-sample estimators, made to fit the same tables and the same training loop.

Both trace the programs once (`importance_traces`), refuse what would give a wrong value in silence, and hand the
traces to Pyro.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.util import is_identically_zero, sum_rightmost
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import MultiFrameTensor, is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_traceenum_requirements
from torch import Tensor

from vma_pyro.infer.engine.checks import check_dimensions, check_nesting, check_no_enumeration, check_same_latents
from vma_pyro.infer.engine.first_look import look
from vma_pyro.infer.engine.masks import check_same_power, without_mask
from vma_pyro.infer.engine.options import Options, check_options
from vma_pyro.infer.engine.plates import Layout, PyroProgram, Site, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import is_about_shapes, run
from vma_pyro.infer.engine.svi import check_svi_trains
from vma_pyro.infer.engine.weights import finite

UNKNOWN_NESTING = 1_000  # more than any program has

Traces = tuple[poutine.Trace, poutine.Trace]  # of the model, of the guide


class GraphELBO(TraceGraph_ELBO):
    r"""Pyro's `TraceGraph_ELBO`, with every cost of a datapoint at each of its scores.

    .. math::
        \nabla = \sum_s (C - b_s) \nabla \log q(a_s) + \nabla_{\theta, z} \log w, \qquad C = \log w

    where b_s is the baseline that the guide's site asks for with Pyro's `infer={"baseline": {...}}` (Schulman et
    al. 2015; NVIL, Mnih & Gregor 2014): none, a running mean (`use_decaying_avg_baseline`), or a network
    (`nn_baseline`). The arguments are Pyro's.

    Departs from Pyro: it takes for C only the terms downstream of site s, which it finds by tensors that remember
    the sites they come from. Autograd functions (Beta, Dirichlet), assignments in place, `vmap`, `jit`, numpy,
    `.item()` and rejection samplers lose that memory, and the gradient is then wrong, up to its sign, without a
    word. All terms of log w are right whatever the program does; those upstream have expectation zero and add
    noise. Terms of other elements of a plate are left out, as a plate says that they do not depend on it.

    Raises:
        ValueError: what `importance_traces` refuses.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 1

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints; its gradient is that of `loss_and_grads`."""
        programs = _begin(self, model, guide, args, kwargs)
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, programs.args, programs.kwargs)
        return surrogate_loss - surrogate_loss.detach() - elbo.detach()

    def loss_and_grads(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        loss = _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)
        check_svi_trains(model, guide)
        return loss

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        programs = _begin(self, model, guide, args, kwargs)
        return super().loss(model, guide, *programs.args, **programs.kwargs)

    def _get_traces(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Iterator[Traces]:
        model, guide = _prepared(model, guide)
        yield from super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Traces:
        return importance_traces(Programs(model, guide, args, kwargs), nesting=self.max_plate_nesting)

    def _loss_and_surrogate_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[Tensor, Tensor]:
        """The bound, and minus a surrogate with its gradient."""
        elbo, surrogate = torch.zeros(()), torch.zeros(())
        costs: list[tuple[Any, Tensor]] = []
        for site in sample_sites(model_trace):
            costs.append((site["cond_indep_stack"], site["log_prob"]))
            surrogate = surrogate + finite(site["log_prob"]).sum()
        for site in sample_sites(guide_trace):
            costs.append((site["cond_indep_stack"], -site["log_prob"]))
            entropy_term = site["score_parts"].entropy_term
            if not is_identically_zero(entropy_term):
                surrogate = surrogate - finite(entropy_term).sum()
        for _, cost in costs:
            elbo = elbo + cost.sum()
        for site in sample_sites(guide_trace):
            if not is_identically_zero(site["score_parts"].score_function):
                surrogate = surrogate + _score_part(site, costs)
        return elbo, -surrogate


def _score_part(site: Site, costs: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """The surrogate of one site's score, less what its baseline has to learn."""
    stack = site["cond_indep_stack"]
    cost = MultiFrameTensor(*(item for item in costs if not _elsewhere(item[0], stack))).sum_to(stack)
    if site["infer"].get("baseline", {}).get("use_decaying_avg_baseline"):
        _check_average(site, cost)
    use_baseline, baseline_loss, baseline = _construct_baseline(site["name"], site, cost)
    if use_baseline:
        cost = cost - baseline
    return (site["score_parts"].score_function * finite(cost.detach())).sum() - baseline_loss


def _check_average(site: Site, cost: Tensor) -> None:
    """Pyro keeps one running mean for each place in the batch, under the site's name alone."""
    name, store = f"__baseline_avg_downstream_cost_{site['name']}", pyro.get_param_store()
    if name in store and store[name].shape != cost.shape:
        raise ValueError(
            f"site '{site['name']}': expected costs of shape {list(store[name].shape)}, as its decaying average "
            f"has one for each place in the batch, got {list(cost.shape)}; keep to one batch size"
        )


def _elsewhere(frames: Any, others: Any) -> bool:
    """Whether two sites are in different elements of a plate that is a loop."""
    counters = {frame.name: frame.counter for frame in others if not frame.vectorized}
    return any(counters.get(f.name, f.counter) != f.counter for f in frames if not f.vectorized)


class EnumeratedELBO(TraceEnum_ELBO):
    r"""Pyro's `TraceEnum_ELBO`, with all discrete sites of the guide enumerated in parallel.

    .. math::
        L = \sum_a q(a) \log \frac{p(x, z_a, a)}{q(a) \, q(z_a \mid a)}

    No score is needed, at |support| runs of the model. The guide itself needs no mark; the arguments are Pyro's.

    Raises:
        ValueError: what `importance_traces` refuses.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 1

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints."""
        programs = _begin(self, model, guide, args, kwargs)
        guide = config_enumerate(guide, "parallel")
        # Pyro's own refuses a loss that no parameter is in, as where all latents are given.
        traces = self._get_traces(model, guide, programs.args, programs.kwargs)
        bounds = [_compute_dice_elbo(*pair) for pair in traces]
        return -torch.as_tensor(sum(bounds) / self.num_particles)

    def loss_and_grads(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        loss = _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)
        check_svi_trains(model, guide)
        return loss

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        programs = _begin(self, model, guide, args, kwargs)
        return super().loss(model, config_enumerate(guide, "parallel"), *programs.args, **programs.kwargs)

    def _get_traces(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Iterator[Traces]:
        model, guide = _prepared(model, guide)
        yield from super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Traces:
        nesting = self.max_plate_nesting
        programs = Programs(model, guide, args, kwargs)
        model_trace, guide_trace = importance_traces(programs, nesting=nesting, enumerated=True)
        if is_validation_enabled():
            check_traceenum_requirements(model_trace, guide_trace)
        with _OneLine():
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        return model_trace, guide_trace


def importance_traces(
    programs: Programs,
    *,
    nesting: float | int,
    enumerated: bool = False,
) -> Traces:
    """Traces of the model, run against the guide, and of the guide, with log probabilities and score parts.

    Args:
        programs: the programs, and their arguments.
        nesting: number of plate dimensions, with the particles'; infinity: unknown.
        enumerated: whether dimensions further left are those of enumerated sites, of which the model may have some
            that the guide lacks.

    Raises:
        ValueError: latent sites that are not the same in model and guide, or not of the same mask and scale; a
            discrete auxiliary site; an estimator at a site; a dimension that no plate declares; NaN.
    """
    guide, args, kwargs = programs.guide, programs.args, programs.kwargs
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(f"guide: expected a program, got the handler {type(poutine.unwrap(guide)).__name__}")
    asked = Options()
    with _OneLine("guide", enumerated=enumerated):
        full = run(guide, args, kwargs)
    drawn = full.copy()
    for site in list(sample_sites(full)):
        if site["is_observed"]:
            drawn.remove_node(site["name"])  # given to the guide: not drawn, and nothing to replay
    summed = [site["name"] for site in sample_sites(full) if site["infer"].get("_enumerate_dim") is not None]
    with _OneLine("model", enumerated=enumerated):
        model_trace = run(poutine.replay(asked(programs.model), trace=drawn), args, kwargs, enumerated=summed)
    model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(full)
    _check(model_trace, guide_trace, asked.found, nesting=nesting, enumerated=enumerated)
    with _OneLine():
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
    for site in sample_sites(guide_trace):
        site["score_parts"] = site["score_parts"]._replace(score_function=_score(site))
    layout = Layout((), int(min(nesting, UNKNOWN_NESTING)))
    for site in (*sample_sites(model_trace), *sample_sites(guide_trace)):
        if not enumerated:
            check_dimensions(site, layout, 1, {})
        if is_validation_enabled() and bool(torch.isnan(site["log_prob"]).any()):
            raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
    return model_trace, guide_trace


def _check(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    model_options: dict[str, Any],
    *,
    nesting: float | int,
    enumerated: bool,
) -> None:
    """What the other estimators refuse as well."""
    options, latent = guide_trace, model_trace
    if enumerated:
        latent = model_trace.copy()
        for site in list(sample_sites(model_trace)):
            if site["infer"].get("enumerate") and site["name"] not in guide_trace:
                latent.remove_node(site["name"])
    else:
        check_no_enumeration(guide_trace)
        options = poutine.Trace()  # but for Pyro's own
        for site in sample_sites(guide_trace):
            infer = {key: value for key, value in site["infer"].items() if key != "baseline"}
            options.add_node(site["name"], **{**site, "infer": infer})
    what = "EnumeratedELBO" if enumerated else "GraphELBO"
    check_options(options, model_options, baselines=False, rules=False, what=what)
    check_same_latents(latent, guide_trace)
    check_same_power(model_trace, guide_trace)
    for trace in (model_trace, guide_trace):
        check_nesting(trace, int(min(nesting, UNKNOWN_NESTING)))


def _score(site: Site) -> Any:
    """The score of the distribution that was drawn from: under masks and `to_event`, where Pyro loses it.

    A value that was given has none, though Pyro finds one.
    """
    if site["is_observed"] and not isinstance(site["fn"], Unit):
        return 0
    fn, inner = without_mask(site["fn"]), 0
    while isinstance(fn, torch.distributions.Independent):
        inner, fn = inner + fn.reinterpreted_batch_ndims, fn.base_dist
    if fn is site["fn"]:
        return site["score_parts"].score_function
    score = fn.score_parts(site["value"]).score_function
    return sum_rightmost(score, inner) if isinstance(score, Tensor) else score


def _begin(elbo: Any, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Programs:
    """The programs, prepared, after a first look at them.

    Particles or enumeration would hide a dimension that no plate declares.
    """
    programs = Programs(model, guide, args, kwargs).prepared()
    nesting = elbo.max_plate_nesting - (elbo.vectorize_particles and elbo.num_particles > 1)
    look.check(programs, int(min(nesting, UNKNOWN_NESTING)))
    return programs


def _prepared(model: PyroProgram, guide: PyroProgram) -> tuple[PyroProgram, PyroProgram]:
    """Model and guide, with masks of distributions at their sites, and given values that cost the guide nothing.

    A value that was given to the guide was not drawn from q, so that log q of it belongs into no weight.
    """
    model, guide = _MaskAtSite()(model), _MaskAtSite()(guide)
    return model, _GivenCostsNothing()(guide)


class _MaskAtSite(Messenger):
    """`fn.mask(...)` as `poutine.mask`: Pyro gives a distribution with a boolean mask no score."""

    def _pyro_sample(self, msg: Any) -> None:
        while isinstance(msg["fn"], MaskedDistribution):
            mask = msg["fn"]._mask
            msg["fn"] = msg["fn"].base_dist
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


class _GivenCostsNothing(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not isinstance(msg["fn"], Unit):
            msg["mask"] = False


class _OneLine:
    """Errors of Pyro and torch in one line; those of a program with what it is expected to take."""

    def __init__(self, program: str = "", *, enumerated: bool = False) -> None:
        self.program, self.enumerated = program, enumerated

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, ValueError | RuntimeError | NotImplementedError | IndexError | TypeError):
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        is_single = text.startswith("vectorize_particles")  # of a program that looks at single values
        if isinstance(error, ValueError) and not (self.enumerated and is_single):
            if len(lines) == 1:
                return
            raise ValueError(text) from error
        if not self.program:
            raise ValueError(text) from error
        if not (is_single or isinstance(error, NotImplementedError) or is_about_shapes(lines[0])):
            return  # the program's own
        what = "all values of its discrete sites" if self.enumerated else "all particles"
        cause = error.__cause__ if is_single and error.__cause__ is not None else error
        raise ValueError(
            f"{self.program}: expected to take {what} at once, in a new dimension on the left, got "
            f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error


def _backward(loss: Tensor, *, retain_graph: bool | None) -> float:
    """Pyro's own methods leave this out, and say nothing, if no site of the programs is a param statement."""
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)
    return loss.item()
