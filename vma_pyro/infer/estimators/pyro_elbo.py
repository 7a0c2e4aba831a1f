"""What Pyro's own single-sample estimators need to fit the same tables and the same training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyro.distributions import MaskedDistribution, Unit
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.first_look import look
from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.svi import check_svi_trains
from vma_pyro.infer.estimators.pyro_traces import UNKNOWN_NESTING, Traces


class PyroELBO(ELBO):
    """An estimator of Pyro's whose traces are those of `importance_traces`; it stands before Pyro's class."""

    objective = "elbo"
    unbiased = True
    min_particles = 1

    @abstractmethod
    def differentiable_loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound in nats, summed over datapoints."""

    def loss_and_grads(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; accumulates gradients in the parameters, of modules as well."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        # Pyro's own leave this out, and say nothing, if no site of the programs is a param statement.
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        check_svi_trains(model, guide)
        return loss.item()

    def _begin(
        self, model: PyroProgram, guide: PyroProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Programs:
        """The programs, prepared, after a first look at them.

        Particles or enumeration would hide a dimension that no plate declares.
        """
        programs = Programs(model, guide, args, kwargs).prepared()
        nesting = self.max_plate_nesting - (self.vectorize_particles and self.num_particles > 1)
        look.check(programs, int(min(nesting, UNKNOWN_NESTING)))
        return programs

    def _get_traces(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Iterator[Traces]:
        """Trace with masks of distributions at their sites, and with given values that cost the guide nothing.

        A value that was given to the guide was not drawn from q, so that its log q belongs in no weight.
        """
        model, guide = _MaskAtSite()(model), _GivenCostsNothing()(_MaskAtSite()(guide))
        yield from super()._get_traces(model, guide, args, kwargs)


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
