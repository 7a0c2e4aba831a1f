"""Distributions whose draws are shifted and scaled where they are unconstrained."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

NEAR = 0.1  # of unconstrained draws after a way there and back, and nats of their density


class Moved(dist.TorchDistribution):
    r"""Draws of another distribution, :math:`T(c + s + e^r (T^{-1}(z_0) - c))`, with their density.

    T leads to the support of the other, c is its mean (0 if it has none). What a draw was made of is kept, so that
    its density needs no inverse of the other distribution, which some flows lack.

    Args:
        fn: the other distribution, reparameterised.
        shift, log_factor: s and r, of the shape of its unconstrained draws.
        name: of the site, for errors.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, fn: Any, shift: Tensor, log_factor: Tensor, *, name: str) -> None:
        self.fn, self.shift, self.log_factor, self.name = fn, shift, log_factor, name
        self.to = to_support(fn)
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the other."""
        return self.fn.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Moved:
        """The same for more datapoints."""
        return Moved(self.fn.expand(batch_shape), self.shift, self.log_factor, name=self.name)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with gradients."""
        z0 = self.fn.rsample(sample_shape)
        u0 = z0 if self.to is None else self.to.inv(z0)
        centre = self._centre()
        u1 = centre + self.shift + self.log_factor.exp() * (u0 - centre)
        value: Tensor = u1 if self.to is None else self.to(u1)
        if self.to is not None:
            self._check(u0, self.to.inv(self.to(u0)))
            self._check(u1, self.to.inv(value))
        self._last = value, z0, u0, u1
        return value

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the last draw, or of any other value."""
        if self._last is not None and value is self._last[0]:
            _, z0, u0, u1 = self._last
        else:
            centre = self._centre()
            u1 = value if self.to is None else self.to.inv(value)
            u0 = centre + (u1 - self.shift - centre) * (-self.log_factor).exp()
            z0 = u0 if self.to is None else self.to(u0)
        dims = len(self.event_shape) if self.to is None else self.to.domain.event_dim
        batch = self.fn.log_prob(z0)
        factor = self.log_factor.expand(u1.shape) if u1.dim() >= self.log_factor.dim() else self.log_factor
        volume = factor.flatten(-dims).sum(-1) if dims else factor
        if self.to is None:
            return batch - volume
        more = len(self.event_shape) - self.to.codomain.event_dim
        return batch - volume + _volume(self.to, u0, more) - _volume(self.to, u1, more)

    def _centre(self) -> Tensor | float:
        """Where draws lie, unconstrained, so that a factor leaves them there."""
        try:
            mean: Tensor = self.fn.mean
        except (NotImplementedError, AttributeError):
            return 0.0
        return (mean if self.to is None else self.to.inv(mean)).nan_to_num(0.0, 0.0, 0.0)

    def _check(self, free: Tensor, again: Tensor) -> None:
        """Refuse draws at the edge of the support, of which rounding has left too little."""
        near = (free - again).abs() <= NEAR
        if not bool(near.all()):
            raise ValueError(
                f"refine: expected draws of site '{self.name}' within the support of {type(self.fn).__name__}, "
                "got some so near to its edge that rounding decides; evaluate without, or in float64"
            )


def _volume(to: Transform, free: Tensor, more: int) -> Tensor:
    """log |det dT| at unconstrained values, summed over `more` dimensions of the event."""
    found: Tensor = to.log_abs_det_jacobian(free, to(free))
    return found.flatten(-more).sum(-1) if more else found


def unconstrained(fn: Any, value: Tensor) -> Tensor | None:
    """A draw where it is unconstrained; None where the distribution does not say where its draws lie."""
    if fn.support.is_discrete or not _says_where(fn):
        return None
    try:
        to = to_support(fn)
    except NotImplementedError:  # spheres, matrices: no map from real numbers is known
        return None
    free: Tensor = value if to is None else to.inv(value)
    return free


def to_support(fn: Any) -> Transform | None:
    """From real numbers to a distribution's support, which may depend on what came before; None if that is all."""
    plain = fn.support
    while isinstance(plain, constraints.independent):
        plain = plain.base_constraint
    if plain in (constraints.real, constraints.real_vector):
        return None
    transform: Transform = biject_to(fn.support)
    return transform


def _says_where(fn: Any) -> bool:
    """Whether the support is what it says: of transformed draws torch takes it for that of the last transform.

    So a shifted exponential is said to lie anywhere; with a base that does, all is right.
    """
    if isinstance(fn, torch.distributions.Independent | dist.torch_distribution.ExpandedDistribution):
        return _says_where(fn.base_dist)
    if type(fn) in (torch.distributions.TransformedDistribution, dist.TransformedDistribution):
        return to_support(fn.base_dist) is None and _says_where(fn.base_dist)
    return True
