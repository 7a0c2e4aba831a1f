"""Pyro's own single-sample estimators, made to fit the same tables and the same training loop."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor

from vma_pyro.infer.plates import Program


class GraphELBO(TraceGraph_ELBO):
    r"""Pyro's `TraceGraph_ELBO` with a `differentiable_loss`.

    .. math::
        \nabla = \sum_s (C_s - b_s) \nabla \log q(a_s) + \nabla_{\theta, z} \log w

    with C_s the terms of log w downstream of site s and b_s the baseline that the guide's site asks for with
    Pyro's `infer={"baseline": {...}}` (Schulman et al. 2015; NVIL, Mnih & Gregor 2014): none, a running mean
    (`use_decaying_avg_baseline`), or a network (`nn_baseline`). The arguments are Pyro's.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 1
    handles_discrete = True

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints; its gradient is that of `loss_and_grads`."""
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        return surrogate_loss - surrogate_loss.detach() - elbo.detach()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        return _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)


class EnumeratedELBO(TraceEnum_ELBO):
    r"""Pyro's `TraceEnum_ELBO`, with all discrete sites of the guide enumerated in parallel.

    .. math::
        L = \sum_a q(a) \log \frac{p(x, z_a, a)}{q(a) \, q(z_a \mid a)}

    No score is needed, at |support| runs of the model. The guide itself needs no mark; the arguments are Pyro's.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 1
    handles_discrete = True

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints."""
        return super().differentiable_loss(model, config_enumerate(guide, "parallel"), *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        return _backward(self.differentiable_loss(model, guide, *args, **kwargs), retain_graph=self.retain_graph)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        return super().loss(model, config_enumerate(guide, "parallel"), *args, **kwargs)


def _backward(loss: Tensor, *, retain_graph: bool | None) -> float:
    """Pyro's own methods leave this out, and say nothing, if no site of the programs is a param statement."""
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)
    return loss.item()
