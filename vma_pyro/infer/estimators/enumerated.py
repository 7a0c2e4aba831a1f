"""Pyro's estimator with all discrete sites enumerated."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.util import is_validation_enabled
from pyro.util import check_traceenum_requirements
from torch import Tensor

from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.one_line import OneLine
from vma_pyro.infer.estimators.pyro_elbo import PyroELBO
from vma_pyro.infer.estimators.pyro_traces import Traces, importance_traces


class EnumeratedELBO(PyroELBO, TraceEnum_ELBO):
    r"""Pyro's `TraceEnum_ELBO`, with all discrete sites of the guide enumerated in parallel.

    .. math::
        L = \sum_a q(a) \log \frac{p(x, z_a, a)}{q(a) \, q(z_a \mid a)}

    No score is needed, at |support| runs of the model. The guide itself needs no mark; the arguments are Pyro's.

    Raises:
        ValueError: what `importance_traces` refuses.
    """

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Minus the bound in nats, summed over datapoints."""
        programs = self._begin(model, guide, args, kwargs)
        guide = config_enumerate(guide, "parallel")
        # Pyro's own refuses a loss that no parameter is in, as where all latents are given.
        traces = self._get_traces(model, guide, programs.args, programs.kwargs)
        bounds = [_compute_dice_elbo(*pair) for pair in traces]
        return -torch.as_tensor(sum(bounds) / self.num_particles)

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        programs = self._begin(model, guide, args, kwargs)
        return super().loss(model, config_enumerate(guide, "parallel"), *programs.args, **programs.kwargs)

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Traces:
        nesting = self.max_plate_nesting
        programs = Programs(model, guide, args, kwargs)
        model_trace, guide_trace = importance_traces(programs, nesting=nesting, enumerated=True)
        if is_validation_enabled():
            check_traceenum_requirements(model_trace, guide_trace)
        with OneLine():
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        return model_trace, guide_trace
