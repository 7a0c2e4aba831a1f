"""Pyro's own single-sample estimators, made to fit the same tables and the same training loop.

Both trace the programs once (`importance_traces`), refuse what would give a wrong value in silence, and hand the
traces to Pyro.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.util import broadcast_shape, is_identically_zero
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import MultiFrameTensor, is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_traceenum_requirements
from torch import Tensor

from vma_pyro.infer.checks import (
    check_nesting,
    check_no_enumeration,
    check_same_latents,
    is_reparameterised,
    latents,
    name_of,
)
from vma_pyro.infer.estimator import finite
from vma_pyro.infer.log_weights import run
from vma_pyro.infer.plates import Program, Site, sample_sites

Traces = tuple[poutine.Trace, poutine.Trace]  # of the model, of the guide


class _Checked:
    """Looks at each new pair of programs in a run without particles and enumeration, before Pyro's own.

    A dimension that no plate declares could be taken for one of theirs, if it has their size.
    """

    max_plate_nesting: Any
    num_particles: int
    vectorize_particles: bool
    _marks = False  # whether the model may mark sites for enumeration

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen = _Seen()

    def _check(self, model: Program, guide: Program, args: Any, kwargs: Any) -> None:
        if self._seen(model, guide):
            return
        nesting = self.max_plate_nesting - (self.vectorize_particles and self.num_particles > 1)
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            importance_traces(*_prepared(model, guide), args, kwargs, nesting=nesting, marks=self._marks)
        self._seen.add(model, guide)


class GraphELBO(_Checked, TraceGraph_ELBO):
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
    handles_discrete = True

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints; its gradient is that of `loss_and_grads`."""
        self._check(model, guide, args, kwargs)
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        return surrogate_loss - surrogate_loss.detach() - elbo.detach()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        return _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        self._check(model, guide, args, kwargs)
        return super().loss(model, guide, *args, **kwargs)

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Iterator[Traces]:
        yield from super()._get_traces(*_prepared(model, guide), args, kwargs)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Traces:
        traces = importance_traces(model, guide, args, kwargs, nesting=self.max_plate_nesting)
        check_no_enumeration(traces[1])
        return traces

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
            if not is_reparameterised(site) and (not site["is_observed"] or isinstance(site["fn"], Unit)):
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


class EnumeratedELBO(_Checked, TraceEnum_ELBO):
    r"""Pyro's `TraceEnum_ELBO`, with all discrete sites of the guide enumerated in parallel.

    .. math::
        L = \sum_a q(a) \log \frac{p(x, z_a, a)}{q(a) \, q(z_a \mid a)}

    No score is needed, at |support| runs of the model. The guide itself needs no mark; the arguments are Pyro's.

    Raises:
        ValueError: what `importance_traces` refuses; a value of probability zero under the guide.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 1
    handles_discrete = True
    _marks = True

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints."""
        self._check(model, guide, args, kwargs)
        return super().differentiable_loss(model, config_enumerate(guide, "parallel"), *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        return _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        self._check(model, guide, args, kwargs)
        return super().loss(model, config_enumerate(guide, "parallel"), *args, **kwargs)

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Iterator[Traces]:
        yield from super()._get_traces(*_prepared(model, guide), args, kwargs)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Traces:
        nesting = self.max_plate_nesting
        model_trace, guide_trace = importance_traces(
            model, guide, args, kwargs, nesting=nesting, marks=True, enumerated=True
        )
        for site in sample_sites(guide_trace):
            if site["infer"].get("_enumerate_dim") is not None and bool((site["log_prob"] == -torch.inf).any()):
                raise ValueError(
                    f"site '{site['name']}': expected a positive probability of every value, as Pyro multiplies "
                    "it with its logarithm, got zero; use another estimator, such as 'sum-and-sample'"
                )
        if is_validation_enabled():
            check_traceenum_requirements(model_trace, guide_trace)
        with _OneLine():
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        return model_trace, guide_trace


def importance_traces(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    nesting: float | int,
    marks: bool = False,
    enumerated: bool = False,
) -> Traces:
    """Traces of the model, run against the guide, and of the guide, with log probabilities and score parts.

    Args:
        model, guide, args, kwargs: the programs, and their arguments.
        nesting: number of plate dimensions, with the particles'; infinity: unknown.
        marks: whether latent sites of the model may be marked for enumeration, and not be in the guide.
        enumerated: whether dimensions further left are those of enumerated sites.

    Raises:
        ValueError: latent sites that are not the same in model and guide, or not of the same mask and scale; a
            discrete auxiliary site; an estimator at a site; a dimension that no plate declares; NaN.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(f"guide: expected a program, got the handler {type(poutine.unwrap(guide)).__name__}")
    at_once = "all values of its discrete sites" if enumerated else "all particles"
    with _OneLine("guide", at_once):
        full = run(guide, args, kwargs)
    drawn = full.copy()
    for site in list(sample_sites(full)):
        if site["is_observed"]:
            drawn.remove_node(site["name"])  # given to the guide, not drawn
    with _OneLine("model", at_once):
        model_trace = prune_subsample_sites(run(poutine.replay(model, trace=drawn), args, kwargs))
    guide_trace = prune_subsample_sites(full)
    _check_latents(model_trace, guide_trace, marks=marks)
    known = not enumerated and not any(_decided(site) for site in sample_sites(guide_trace))
    for trace in (model_trace, guide_trace):
        for site in sample_sites(trace):
            _check_no_estimator(site)
            if known:
                check_declared(site)
        if nesting < torch.inf:
            check_nesting(trace, int(nesting))
    with _OneLine():
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
    for trace in (model_trace, guide_trace):
        for site in sample_sites(trace):
            if is_validation_enabled() and bool(torch.isnan(site["log_prob"]).any()):
                raise ValueError(f"site '{site['name']}': expected a log probability, got NaN")
    check_same_mask_and_scale(model_trace, guide_trace)
    _check_auxiliary(model_trace, guide_trace)
    return model_trace, guide_trace


def check_same_mask_and_scale(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """log p and log q of a latent site count alike; else there is no bound, and the guide learns another thing."""
    for site in sample_sites(guide_trace):
        name = site["name"]
        if site["is_observed"] or name not in model_trace or bool((site["unscaled_log_prob"] == 0).all()):
            continue  # nothing to weigh: a point
        in_model: Any = model_trace.nodes[name]
        if not _same(in_model["scale"], site["scale"]):
            raise ValueError(
                f"site '{name}': expected the same scale in the model as in the guide, {_shown(site['scale'])}, "
                f"got {_shown(in_model['scale'])}; scale it in both"
            )
        masks = [True if s["mask"] is None else s["mask"] for s in (in_model, site)]
        if not _same(*masks):
            raise ValueError(
                f"site '{name}': expected the same mask in the model as in the guide, {_shown(masks[1])}, "
                f"got {_shown(masks[0])}; mask it in both"
            )


def check_declared(site: Site) -> None:
    """Every dimension of a site's batch is that of a plate."""
    fn, value = site["fn"], site["value"]
    shape = fn.batch_shape
    if isinstance(value, Tensor):
        with suppress(ValueError):  # which the log probability tells better
            shape = broadcast_shape(shape, value.shape[: value.dim() - fn.event_dim])
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in frames:
            raise ValueError(
                f"site '{site['name']}': expected a plate at dimension {dim}, where it has size {shape[dim]}, "
                f"found plates {sorted(f.name for f in frames.values())}; declare it, or use .to_event(...)"
            )


def _decided(site: Site) -> bool:
    """Whether a handler gave the site values of more dimensions than it has: those of particles to come."""
    return isinstance(site["value"], Tensor) and site["value"].dim() > len(site["fn"].shape())


def _check_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace, *, marks: bool) -> None:
    given = {site["name"] for site in sample_sites(guide_trace) if site["is_observed"]}
    for name in sorted(given & latents(model_trace)):
        raise ValueError(
            f"site '{name}': expected its value in the model as in the guide, where it is given; condition both"
        )
    if marks:
        model_trace = model_trace.copy()
        for site in list(sample_sites(model_trace)):
            if site["infer"].get("enumerate") and site["name"] not in guide_trace:
                model_trace.remove_node(site["name"])
    check_same_latents(model_trace, guide_trace)


def _check_auxiliary(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Summed over a discrete site that the model lacks, E w is the number of its values times p(x)."""
    for name in sorted(latents(guide_trace) - latents(model_trace)):
        if not is_reparameterised(guide_trace.nodes[name]):
            raise ValueError(
                f"site '{name}': expected in the model as well, as a discrete auxiliary site without a reverse "
                "model makes the bound exceed log p(x); add its reverse, p(site | the others), to the model"
            )


def _check_no_estimator(site: Site) -> None:
    asked = site["infer"].get("estimator")
    if asked is not None:
        raise ValueError(
            f"site '{site['name']}': expected no estimator of its own under Pyro's estimators, "
            f"got {name_of(asked)}"
        )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    first, second = (torch.as_tensor(t).detach().double().cpu() for t in (one, other))
    try:
        return bool(torch.isclose(first, second).all())
    except RuntimeError:  # of shapes that do not fit
        return False


def _shown(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) and value.dim() else f"{float(value):g}"


def _prepared(*programs: Program) -> tuple[Program, ...]:
    """Model and guide, with masks of distributions at their sites, and given values that cost the guide nothing.

    A value that was given to the guide was not drawn from q, so that log q of it belongs into no weight.
    """
    model, guide = (_MaskAtSite()(program) for program in programs)
    return model, _GivenCostsNothing()(guide)


class _MaskAtSite(Messenger):
    """`fn.mask(...)` as `poutine.mask`: Pyro gives a distribution with a boolean mask no score."""

    def _pyro_sample(self, msg: Any) -> None:
        while isinstance(msg["fn"], MaskedDistribution):
            mask = msg["fn"]._mask
            msg["fn"] = msg["fn"].base_dist
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask
        fn = msg["fn"]
        while hasattr(fn, "base_dist") and not fn.has_rsample:
            fn = fn.base_dist
            if isinstance(fn, MaskedDistribution):
                raise ValueError(
                    f"site '{msg['name']}': expected its mask around the whole distribution, as its score has "
                    "none, got one inside .to_event(...)"
                )


class _GivenCostsNothing(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not isinstance(msg["fn"], Unit):
            msg["mask"] = False


class _Seen:
    """Pairs of programs, as long as they live; a copy has seen none, as weak references cannot be copied."""

    def __init__(self) -> None:
        self._pairs: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Seen, ()

    def __call__(self, model: Program, guide: Program) -> bool:
        try:
            return self._pairs[model]() is guide
        except (KeyError, TypeError):
            return False

    def add(self, model: Program, guide: Program) -> None:
        """Remember a pair; one without weak references is looked at each time."""
        with suppress(TypeError):
            self._pairs[model] = weakref.ref(guide)


class _OneLine:
    """Errors of Pyro and torch in one line, that of a program with what the program is expected to take."""

    def __init__(self, program: str = "", at_once: str = "") -> None:
        self.program, self.at_once = program, at_once

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, ValueError | RuntimeError | NotImplementedError | IndexError | TypeError):
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines[:2] if len(lines) > 1 and lines[0].endswith(":") else lines[:1])
        if isinstance(error, ValueError):
            if "\n" not in str(error):
                return
            raise ValueError(text) from error
        if not self.program:
            raise ValueError(text) from error
        raise ValueError(
            f"{self.program}: expected to take {self.at_once} at once, in a dimension on the left, got "
            f"{type(error).__name__}: {text}"
        ) from error


def _backward(loss: Tensor, *, retain_graph: bool | None) -> float:
    """Pyro's own methods leave this out, and say nothing, if no site of the programs is a param statement."""
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)
    return loss.item()
