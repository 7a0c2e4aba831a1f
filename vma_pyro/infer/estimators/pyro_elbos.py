"""Pyro's own single-sample estimators, made to fit the same tables and the same training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import is_identically_zero
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import MultiFrameTensor, is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_traceenum_requirements
from torch import Tensor

from vma_pyro.infer.engine.estimator import Objective, Scalar
from vma_pyro.infer.engine.first_look import look
from vma_pyro.infer.engine.paths import watched
from vma_pyro.infer.engine.plates import PyroProgram, Site, is_given, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import one_line
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.pyro_traces import UNKNOWN_NESTING, TracePair, importance_traces


class PyroELBO(Objective):
    """An estimator of Pyro's whose traces are those of `importance_traces`; it stands before Pyro's class."""

    objective = "elbo"
    unbiased = True

    @abstractmethod
    def _loss(self, programs: Programs) -> Tensor:
        """Compute minus the bound in nats, summed over datapoints, with its gradient."""

    def differentiable_loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Scalar:
        """Compute minus the bound in nats, summed over datapoints; its gradient is that of `loss_and_grads`."""
        programs = self._prepare(Programs(model, guide, args, kwargs))
        return watched(programs, lambda: self._loss(programs))

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Compute minus the bound, without gradients."""
        programs = self._prepare(Programs(model, guide, args, kwargs))
        pyros: Any = super()  # a class of Pyro's, as mypy cannot know
        return pyros.loss(programs.model, programs.guide, *programs.args, **programs.kwargs)

    def _prepare(self, programs: Programs) -> Programs:
        """Look at the programs: particles or enumeration would hide a dimension that no plate declares."""
        programs = programs.prepared()
        nesting = self.max_plate_nesting - (self.vectorize_particles and self.num_particles > 1)
        look.check(programs, int(min(nesting, UNKNOWN_NESTING)))
        return programs

    def _get_traces(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Iterator[TracePair]:
        """Trace with masks of distributions at their sites, and with given values that cost the guide nothing.

        A value that was given to the guide was not drawn from q, so that its log q belongs in no weight.
        """
        model, guide = _MaskAtSite()(model), _GivenCostsNothing()(_MaskAtSite()(guide))
        yield from super()._get_traces(model, guide, args, kwargs)


class GraphELBO(PyroELBO, TraceGraph_ELBO):
    r"""Pyro's `TraceGraph_ELBO`, with every cost of a datapoint at each of its scores.

    .. math::
        \nabla = \sum_s (C - b_s) \nabla \log q(a_s) + \nabla_{\theta, z} \log w, \qquad C = \log w

    where b_s is the baseline that the guide's site asks for with Pyro's `infer={"baseline": {...}}` (Schulman et
    al. 2015; NVIL, Mnih & Gregor 2014): none, a running mean (`use_decaying_avg_baseline`), or a network
    (`nn_baseline`). The arguments are Pyro's.

    This departs from Pyro, which takes for C only the terms downstream of site s, and finds them by tensors that
    remember the sites they come from. Autograd functions (Beta, Dirichlet), assignments in place, `vmap`, `jit`,
    numpy, `.item()` and rejection samplers lose that memory, and the gradient is then silently wrong, up to its
    sign. All terms of log w are right whatever the program does; those upstream only add noise. Terms of other
    elements of a plate are left out, as a plate says that they do not depend on it.

    Raises:
        ValueError: what `importance_traces` refuses.
    """

    def _loss(self, programs: Programs) -> Tensor:
        p = programs
        elbo, surrogate_loss = self._loss_and_surrogate_loss(p.model, p.guide, p.args, p.kwargs)
        return surrogate_loss - surrogate_loss.detach() - elbo.detach()

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> TracePair:
        return importance_traces(Programs(model, guide, args, kwargs), nesting=self.max_plate_nesting)

    def _loss_and_surrogate_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[Tensor, Tensor]:
        """Compute the bound, and minus a surrogate with its gradient."""
        elbo, surrogate = torch.zeros(()), torch.zeros(())
        costs: list[tuple[Any, Tensor]] = []
        for site in sample_sites(model_trace):
            costs.append((site["cond_indep_stack"], site["log_prob"]))
            surrogate = surrogate + finite(site["log_prob"]).sum()
        for site in sample_sites(guide_trace):
            costs.append((site["cond_indep_stack"], -site["log_prob"]))
            if not is_identically_zero(site["score_parts"].entropy_term):
                surrogate = surrogate - finite(site["score_parts"].entropy_term).sum()
        for _, cost in costs:
            elbo = elbo + cost.sum()
        for site in sample_sites(guide_trace):
            if not is_identically_zero(site["score_parts"].score_function):
                surrogate = surrogate + _score_part(site, costs)
        return elbo, -surrogate


class EnumeratedELBO(PyroELBO, TraceEnum_ELBO):
    r"""Pyro's `TraceEnum_ELBO`, with all discrete sites of the guide enumerated in parallel.

    .. math::
        L = \sum_a q(a) \log \frac{p(x, z_a, a)}{q(a) \, q(z_a \mid a)}

    No score is needed, at |support| runs of the model. The guide itself needs no mark; the arguments are Pyro's.

    Raises:
        ValueError: what `importance_traces` refuses.
    """

    def _loss(self, programs: Programs) -> Tensor:
        # Pyro's own refuses a loss that no parameter is in, as where all latents are given.
        traces = self._get_traces(programs.model, programs.guide, programs.args, programs.kwargs)
        bounds = [_compute_dice_elbo(*pair) for pair in traces]
        return -torch.as_tensor(sum(bounds) / self.num_particles)

    def _prepare(self, programs: Programs) -> Programs:
        programs = super()._prepare(programs)
        return replace(programs, guide=config_enumerate(programs.guide, "parallel"))

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> TracePair:
        programs = Programs(model, guide, args, kwargs)
        model_trace, guide_trace = importance_traces(programs, nesting=self.max_plate_nesting, enumerated=True)
        if is_validation_enabled():
            check_traceenum_requirements(model_trace, guide_trace)
        with one_line():
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        return model_trace, guide_trace


def _score_part(site: Site, costs: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """Compute the surrogate of one site's score, less what its baseline has to learn."""
    stack = site["cond_indep_stack"]
    cost = MultiFrameTensor(*(item for item in costs if not _elsewhere(item[0], stack))).sum_to(stack)
    if site["infer"].get("baseline", {}).get("use_decaying_avg_baseline"):
        _check_average(site, cost)
    use_baseline, baseline_loss, baseline = _construct_baseline(site["name"], site, cost)
    if use_baseline:
        cost = cost - baseline
    return (site["score_parts"].score_function * finite(cost.detach())).sum() - baseline_loss


def _check_average(site: Site, cost: Tensor) -> None:
    """Refuse another batch size, as Pyro keeps one running mean for each place in the batch."""
    name, store = f"__baseline_avg_downstream_cost_{site['name']}", pyro.get_param_store()
    if name in store and store[name].shape != cost.shape:
        raise ValueError(
            f"site '{site['name']}': expected costs of shape {list(store[name].shape)}, as its decaying average "
            f"has one for each place in the batch, got {list(cost.shape)}; keep to one batch size"
        )


def _elsewhere(frames: Any, others: Any) -> bool:
    """Tell whether two sites are in different elements of a plate that is a loop."""
    counters = {frame.name: frame.counter for frame in others if not frame.vectorized}
    return any(counters.get(f.name, f.counter) != f.counter for f in frames if not f.vectorized)


class _MaskAtSite(Messenger):
    """Turn `fn.mask(...)` into `poutine.mask`: Pyro gives a distribution with a boolean mask no score."""

    def _pyro_sample(self, msg: Any) -> None:
        while isinstance(msg["fn"], MaskedDistribution):
            mask = msg["fn"]._mask
            msg["fn"] = msg["fn"].base_dist
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


class _GivenCostsNothing(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if is_given(msg) and not msg["infer"].get("_deterministic"):
            msg["mask"] = False
