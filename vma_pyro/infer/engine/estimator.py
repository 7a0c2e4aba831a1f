"""The interfaces of all estimators, and what each says of itself."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import pyro
import torch
from jaxtyping import Float
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn

from vma_pyro.infer.engine.first_look import PlateNesting, look
from vma_pyro.infer.engine.handlers import CommonNoise
from vma_pyro.infer.engine.log_weights import draw
from vma_pyro.infer.engine.options import check_site_options
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.paths import watched
from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Handler, Programs
from vma_pyro.infer.engine.svi import check_svi_trains

Scalar = Float[Tensor, ""]


class PlateOptions(TypedDict, total=False):
    """Arguments of every estimator, explained at `Estimator`."""

    noise: str
    batch_plates: Sequence[str]
    max_plate_nesting: int | None
    retain_graph: bool | None


class RunOptions(PlateOptions, total=False):
    """Arguments of estimators that draw each particle like the others."""

    vectorize_particles: bool


class Estimate(NamedTuple):
    """One draw of an objective and of its gradient.

    Attributes:
        value: the objective of each datapoint [B], in nats.
        surrogate: a scalar whose gradient is the estimate of that of the objective, summed over datapoints;
            its value means nothing.
        scale: full size over subsample size.
    """

    value: Float[Tensor, " B"]
    surrogate: Scalar
    scale: float


class Objective(ELBO):
    """A `pyro.infer.ELBO` that says what it estimates, and that SVI and `elbo(model, guide)` train alike.

    Attributes:
        objective: what is estimated: "iwae" (the K-sample bound), "iwae-coupled" (the same of particles that share
            draws), "elbo", "exact" (the bound with the site summed inside the logarithm), "distinct", "tvo",
            "relaxed", or "wake-sleep" (no single objective).
        unbiased: whether the expected gradient is that of the objective, for all parameters.
        min_particles: the least K.
        values: what discrete values it is for: "any", "binary" or "categorical".
    """

    objective: str
    unbiased: bool
    min_particles: int = 1
    values: str = "any"

    @abstractmethod
    def differentiable_loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Scalar:
        """Compute minus the objective in nats, summed over datapoints; its gradient is the estimator's."""

    def loss_and_grads(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Compute minus the objective; accumulates gradients in the parameters. `pyro.infer.SVI` calls it."""
        for name, part in self.learned_parts().items():
            pyro.module(f"{name}.{id(part)}", part)  # two objectives must not share parameters by their name
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        check_svi_trains(model, guide)
        return loss.item()

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return modules of the estimator that are trained along; none by default."""
        return {}


class Estimator(Objective):
    """A gradient estimator for programs with discrete and continuous latents, as a `pyro.infer.ELBO`.

    A new one defines `_estimate` and says what it is. All work as a loss (`elbo(model, guide)` is an
    `nn.Module`), with `pyro.infer.SVI`, and in `compare`. A guide with a method `prepare` prepares the arguments
    of both programs once per estimate, see `vma_pyro.infer.engine.programs.Programs`.

    Attributes:
        draws_per_score: particles that share the values of the sites that are not reparameterised.

    Args:
        num_particles: K.
        noise: "independent" (default), or "common": the particles of a datapoint share the base noise of their
            reparameterised sites.
        batch_plates: plates whose elements are the datapoints. Every site must lie inside them. With none, `()`,
            the whole data set has one weight per particle, as programs with latents that all datapoints share
            need; a program without plates is one datapoint anyway.
        max_plate_nesting: number of plate dimensions in the programs; None runs them once more to find out.
        vectorize_particles: run all particles at once (default) or one after the other.
        retain_graph: keep the graph after `loss_and_grads`.

    Raises:
        ValueError: fewer than `min_particles`, batch plates that are no sequence of names.
    """

    draws_per_score: int = 1
    _knows_rules = False  # whether sites may ask for pathwise rules
    _knows_baselines = False  # whether they may ask for score baselines
    _differentiates_draws = True  # whether gradients pass through reparameterised values
    _couples = True  # whether particles may share noise

    def __init__(
        self,
        num_particles: int = 2,
        *,
        noise: str = "independent",
        batch_plates: Sequence[str] = ("data",),
        max_plate_nesting: int | None = None,
        vectorize_particles: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles: expected at least 1, got {num_particles}")
        if num_particles < self.min_particles:
            raise ValueError(
                f"num_particles: expected at least {self.min_particles} for {self._what()}, got {num_particles}"
            )
        if isinstance(batch_plates, str) or not all(isinstance(name, str) for name in batch_plates):
            raise ValueError(f"batch_plates: expected a sequence of plate names, got {batch_plates!r}")
        if noise not in ("independent", "common"):
            raise ValueError(f"noise: expected 'independent' or 'common', got {noise!r}")
        if noise == "common" and not self._couples:
            raise ValueError(f"noise: expected 'independent' for {type(self).__name__}, got {noise!r}")
        super().__init__(
            num_particles=num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        # The base class would add one for the particle plate and overwrite a guess in place.
        self.max_plate_nesting = max_plate_nesting
        self.noise = noise
        self.batch_plates = tuple(batch_plates)
        self._count_plates = PlateNesting()

    @abstractmethod
    def _estimate(self, programs: Programs) -> Estimate:
        """Draw the objective and its gradient once."""

    def __call__(self, model: nn.Module, guide: nn.Module) -> ELBOModule:
        """Make the loss a module of model, guide, and what the estimator learns itself."""
        module = super().__call__(model, guide)
        for name, part in self.learned_parts().items():
            module.add_module(name, part)
        return module

    def differentiable_loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> Scalar:
        """Compute minus the objective in nats, summed over datapoints; its gradient is the estimator's."""
        value, surrogate, scale = self._checked_estimate(Programs(model, guide, args, kwargs).prepared())
        # The surrogate has a gradient but no value: the loss stays the objective.
        return -scale * (value.detach().sum() + (surrogate - surrogate.detach()))

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Compute minus the objective in nats, summed over datapoints, without gradients."""
        value, _, scale = self._checked_estimate(Programs(model, guide, args, kwargs).prepared())
        return -scale * value.sum().item()

    def _checked_estimate(self, programs: Programs) -> Estimate:
        """Refuse what could not be told from several particles, then estimate."""
        if self.vectorize_particles and self._all_particles() > 1:
            look.check(programs, self._nesting(programs))
        if not self._differentiates_draws:
            return self._estimate(programs)
        return watched(programs, lambda: self._estimate(programs))

    def _all_particles(self) -> int:
        """Count all particles of one estimate, those that only compare others among them."""
        return self.num_particles * self.draws_per_score

    def _what(self) -> str:
        """Name what needs so many particles, for the error."""
        return type(self).__name__

    def _nesting(self, programs: Programs) -> int:
        return self._count_plates(programs) if self.max_plate_nesting is None else self.max_plate_nesting

    def _draw(
        self,
        programs: Programs,
        num_particles: int,
        *,
        handlers: Sequence[Handler] = (),
        nesting: int | None = None,
        **options: Any,
    ) -> Particles:
        """Draw with this objective's plates and noise; `nesting` if it is known."""
        nesting = self._nesting(programs) if nesting is None else nesting
        if self.noise == "common":
            handlers = [CommonNoise(nesting), *handlers]
        check = functools.partial(
            check_site_options,
            baselines=self._knows_baselines,
            rules=self._knows_rules,
            what=type(self).__name__,
            coupled=self.noise == "common" and self.objective != "elbo",
        )
        return draw(
            programs,
            num_particles=num_particles,
            batch_plates=self.batch_plates,
            max_plate_nesting=nesting,
            vectorize=self.vectorize_particles,
            handlers=handlers,
            linear=self.objective == "elbo",
            check_guide=check,
            **options,
        )

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Any:
        """Refuse Pyro's abstract hook: particles are drawn in `vma_pyro.infer.engine.log_weights`."""
        raise NotImplementedError(f"{type(self).__name__} draws with vma_pyro.infer.draw_particles")
