"""Pyro's estimator with a score for each discrete site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import TraceGraph_ELBO
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import MultiFrameTensor
from torch import Tensor

from vma_pyro.infer.engine.plates import PyroProgram, Site, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.pyro_elbo import PyroELBO
from vma_pyro.infer.estimators.pyro_traces import Traces, importance_traces


class GraphELBO(PyroELBO, TraceGraph_ELBO):
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

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints; its gradient is that of `loss_and_grads`."""
        programs = self._begin(model, guide, args, kwargs)
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, programs.args, programs.kwargs)
        return surrogate_loss - surrogate_loss.detach() - elbo.detach()

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        programs = self._begin(model, guide, args, kwargs)
        return super().loss(model, guide, *programs.args, **programs.kwargs)

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
