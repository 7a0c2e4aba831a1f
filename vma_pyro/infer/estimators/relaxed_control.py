"""Control variates through a relaxation: what REBAR and RELAX share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.first_look import Known, is_recorded, undisturbed
from vma_pyro.infer.engine.handlers import Message, RepeatedNoise, is_drawn
from vma_pyro.infer.engine.own_derivative import Line, find_gap
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.conditional_relaxation import RelaxedSite
from vma_pyro.infer.estimators.relaxed import check_relaxable
from vma_pyro.infer.estimators.soft_reading import Soften
from vma_pyro.infer.estimators.squared_gradient import ascent_of_minus, learned

LOOKED_AT = Known()  # whether their gradient is the derivative of their value
Pair = tuple[Float[Tensor, "K B"], Float[Tensor, "K B"]]  # c(z) and c(z given x)


class RelaxedControlELBO(Estimator):
    r"""The evidence lower bound with a control variate c of perturbed logits z of its discrete sites.

    .. math::
        \nabla_\phi = \big[ f(x) - c(\tilde z) \big] h + \nabla_\phi c(z) - \nabla_\phi c(\tilde z),
        \qquad h = x - q

    with f = log w, x the value at which z is largest and z~ drawn like z given x, see `conditional_relaxation`.
    Unbiased for every c, as z~ is distributed like z. What c has learned follows the gradient of
    :math:`\sum_\phi | \nabla_\phi |^2` over the logits of the same draw, in training mode.

    A site must have a distribution that no relaxed site before it decides: else z would need a relaxation of its
    own for each layer.

    Args:
        num_particles: K, the number of draws over which the gradient is averaged.
        site: name of the site, or names; None: all discrete sites. `Categorical`, `OneHotCategorical` or
            `Bernoulli`. Other sites must be reparameterised.
        batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: no such site, or one of another family; one that an earlier one decides; another site that is
            not reparameterised.
    """

    objective = "elbo"
    unbiased = True
    _knows_rules = True
    _couples = False

    def __init__(self, num_particles: int = 1, *, site: str | Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        self.sites = (site,) if isinstance(site, str) else None if site is None else tuple(site)

    @abstractmethod
    def _control(self, programs: Programs, drawn: RelaxedDraw) -> Pair:
        """Compute c(z) and c(z given x) of relaxed sites, differentiable in phi and in what is learned."""

    def _estimate(self, programs: Programs) -> Estimate:
        nesting = self._nesting(programs)
        watch, noise = Watch(self.sites, nesting, type(self).__name__), RepeatedNoise(nesting)
        particles = self._draw(
            replace(programs, guide=watch(programs.guide)),
            self.num_particles,
            handlers=[noise] if self._runs_softly else [],
            nesting=nesting,
            in_plate=True,
        )
        watch.check(particles)
        log_w = particles.log_weights  # [K, B]
        particles.open_gates(torch.ones_like(log_w))  # every particle has a bound of its own: dreg is stl
        # The score, whose mean is zero, takes the derivative of -log q(a) out of log w.
        surrogate = (finite(log_w) + particles.score).mean(0).sum()
        if torch.is_grad_enabled() and particles.scores:
            drawn = RelaxedDraw(particles, [RelaxedSite.of(score) for score in particles.scores], noise)
            surrogate = surrogate + self._score_part(programs, drawn)
        return Estimate(log_w.detach().mean(0), surrogate, particles.scale)

    @property
    def _runs_softly(self) -> bool:
        """Tell whether the programs are run on weights, too."""
        return True

    def _score_part(self, programs: Programs, drawn: RelaxedDraw) -> Float[Tensor, ""]:
        """Compute the surrogate of the logits, and of what is learned."""
        live = drawn.particles.live
        c, c_given = (torch.where(live, finite(t), 0.0) for t in self._control(programs, drawn))
        advantage = finite(drawn.particles.log_weights.detach()) - c_given  # differentiable in what is learned
        parameters = learned(self.learned_parts().values())
        phis = [site.phi for site in drawn.sites]
        slopes = slopes_of(c - c_given, phis, again=bool(parameters))
        surrogate, square = c.new_zeros(()), c.new_zeros(())
        for site, slope in zip(drawn.sites, slopes, strict=True):
            gradient = finite(site.spread(advantage, drawn.particles) * site.h + slope)
            surrogate = surrogate + (gradient.detach() * site.logits).sum() / self.num_particles
            square = square + gradient.square().sum() / self.num_particles
        return surrogate + ascent_of_minus(square, parameters)

    def _of_program(self, programs: Programs, drawn: RelaxedDraw, control: Temperature) -> Pair:
        """Compute eta f(softmax(z / tau)) for z, and for z given x, in one run of the programs."""
        log_w = drawn.particles.log_weights
        temperature = control.log_temperature.exp().to(log_w)
        self._look_along(programs, drawn)
        weights = {site.score.name: site.weights(temperature) for site in drawn.sites}
        log_w_of_both = self._softly(programs, drawn, weights, 2 * self.num_particles)
        c, c_given = (control.eta.to(log_w) * finite(log_w_of_both)).chunk(2)
        return c, c_given

    @not_compiled
    def _look_along(self, programs: Programs, drawn: RelaxedDraw) -> None:
        """Refuse a pair of programs whose gradient in weights is not the derivative of log w."""
        if is_recorded() or not LOOKED_AT.is_due(programs):  # what is recorded is run as well, and looked at then
            return
        with undisturbed(programs.model, programs.guide):
            turns = [site.corners() for site in drawn.sites]
            for start, end in pairwise(range(len(turns[0]))):
                lines = {
                    site.score.name: Line(corners[start], corners[end], site.summed)
                    for site, corners in zip(drawn.sites, turns, strict=True)
                }
                gap = find_gap(lines, lambda weights: self._softly(programs, drawn, weights, self.num_particles))
                if gap is not None:
                    raise ValueError(
                        f"site '{next(iter(lines))}': expected log w with its own derivative in the weights, as "
                        f"{type(self).__name__} needs, got {gap.moved:.3g} nats between two of them where the "
                        f"gradient says {gap.expected:.3g}: the program compares, rounds or detaches what it "
                        "makes of them; use RLOO, or RELAX(reads_softly=False)"
                    )

    def _softly(
        self, programs: Programs, drawn: RelaxedDraw, weights: Mapping[str, Tensor], num_particles: int
    ) -> Float[Tensor, "N B"]:
        """Run the programs on weights, with the noise of the draw."""
        soften = Soften(weights)
        softly = programs.with_subsamples(drawn.particles.subsamples).under(soften)
        options: dict[str, Any] = {"nesting": self._nesting(programs), "pathwise": None}
        with soften.reading(type(self).__name__):
            return self._draw(softly, num_particles, handlers=[drawn.noise], **options).log_weights


def slopes_of(values: Tensor, phis: list[Tensor], *, again: bool) -> list[Tensor]:
    """Differentiate values with respect to logits, `again` if that is to be differentiated; 0 of a constant."""
    if not values.requires_grad:
        return [torch.zeros_like(phi) for phi in phis]
    found = torch.autograd.grad(values.sum(), phis, create_graph=again, allow_unused=True)
    return [torch.zeros_like(phi) if g is None else g for phi, g in zip(phis, found, strict=True)]


class RelaxedDraw(NamedTuple):
    """A draw of the programs, its discrete sites relaxed, and the noise of its reparameterised ones."""

    particles: Particles
    sites: list[RelaxedSite]
    noise: RepeatedNoise


class Temperature(nn.Module):
    """eta and log tau of the control variate f(softmax(z / tau)), both learned.

    Args:
        temperature: tau at the start.
        eta: at the start.
    """

    def __init__(self, temperature: float, eta: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.eta = nn.Parameter(torch.tensor(float(eta)))


class Watch(Messenger):
    """Notes the sites to relax, and refuses one that earlier ones may decide; it stands inside the plate."""

    def __init__(self, sites: Sequence[str] | None, max_plate_nesting: int, what: str) -> None:
        self.sites, self.nesting, self.what = sites, max_plate_nesting, what
        self.met: list[str] = []

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if not is_drawn(msg) or msg["fn"].has_rsample or (self.sites is not None and name not in self.sites):
            return
        check_relaxable(msg)
        if self.met and len(msg["fn"].batch_shape) > self.nesting:
            raise ValueError(
                f"site '{name}': expected a distribution that no earlier draw decides, as {self.what} relaxes it "
                f"together with '{self.met[0]}', got one that differs between particles; use RLOO"
            )
        self.met.append(name)

    def check(self, particles: Particles) -> None:
        """Refuse names that were not met, and sites that are neither relaxed nor reparameterised."""
        for name in self.sites or ():
            if name not in self.met:
                raise ValueError(f"site '{name}': expected a discrete site in the guide, found none")
        for score in particles.scores:
            if score.name not in self.met:
                beside = "the relaxed ones" if self.sites is None else ", ".join(map(repr, self.sites))
                raise ValueError(
                    f"site '{score.name}': expected a reparameterised site beside {beside}, got one that is not"
                )
