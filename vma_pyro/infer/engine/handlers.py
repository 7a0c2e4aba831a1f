"""Effect handlers that decide how sites are drawn: without gradients, shared by particles, or enumerated.

They stand outside the particle plate, so that a site's distribution has all its plate dimensions when they see it.
Sites whose value is already decided (observed, replayed, conditioned) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import (
    LOCATION_SCALE,
    MOST_JOINT_VALUES,
    elementary,
    innermost,
    is_finite,
    is_location_scale,
    too_many,
)

Message = Any  # what Pyro passes to handlers at a site


def is_drawn(msg: Message) -> bool:
    """Tell whether this site, after it has run, has a random value of its own."""
    return (
        not msg["is_observed"]
        and hasattr(msg["fn"], "batch_shape")
        and not msg["infer"].get("_deterministic")
        and type(msg["fn"]).__name__ != "_Subsample"
    )


def is_open(msg: Message) -> bool:
    """Tell whether this site still waits for a random value."""
    return not msg["done"] and msg["value"] is None and is_drawn(msg)


def decide(msg: Message, value: Tensor) -> None:
    """Give the site its value; handlers further out and Pyro's own sampling then leave it."""
    msg["value"], msg["done"] = value, True


def check_finite_support(msg: Message, purpose: str = "", *, of: str = "datapoints") -> None:
    """Refuse a site whose values cannot be listed, or whose probabilities a mask of its own hides."""
    name, fn = msg["name"], msg["fn"]
    inner = elementary(fn)[0]
    masked = isinstance(inner, MaskedDistribution)
    if not is_finite(inner.base_dist if masked else fn):
        raise ValueError(
            f"site '{name}': expected a finite support{purpose}, got {innermost(fn).__class__.__name__}"
        )
    if masked:  # log_prob is not the probability of drawing
        raise ValueError(
            f"site '{name}': expected its mask from poutine.mask, as its values are chosen, "
            "got a masked distribution"
        )
    try:
        number = too_many(fn)
    except NotImplementedError as error:  # a Binomial with a total count for each datapoint
        raise ValueError(
            f"site '{name}': expected a finite support, the same for all {of}, got "
            f"{elementary(fn)[0].__class__.__name__} whose support cannot be enumerated"
        ) from error
    if number:
        raise ValueError(
            f"site '{name}': expected at most {MOST_JOINT_VALUES} joint values of its elements{purpose}, "
            f"got {number}"
        )


def draw(msg: Message) -> Tensor:
    """Draw what a site waits for."""
    value: Tensor = msg["fn"](*msg["args"], **msg["kwargs"])
    return value


class DetachValues(Messenger):
    """Draw every site without a gradient through its value, as wake-sleep needs."""

    def _pyro_sample(self, msg: Message) -> None:
        if is_open(msg):
            _check_density(msg)
            with torch.no_grad():
                value = draw(msg)
            decide(msg, _forgotten(msg, value))


def _check_density(msg: Message) -> None:
    """Refuse a point whose place is learned: it has no density that could learn it."""
    base = innermost(msg["fn"])
    if isinstance(base, Delta) and (base.v.requires_grad or base.log_density.requires_grad):
        raise ValueError(
            f"site '{msg['name']}': expected a density where samples are held fixed, got Delta, whose parameters "
            "would learn nothing; use an objective that differentiates through draws, such as MultiSampleELBO"
        )


def _forgotten(msg: Message, value: Tensor) -> Tensor:
    """Copy a drawn value, so that the distribution takes it for any other.

    A flow that remembers its draws (`cache_size`) hands back the noise without a gradient, and log q would have
    none in its parameters: it must go from the value to the noise again.
    """
    base = innermost(msg["fn"], through_transforms=False)
    if not hasattr(base, "transforms"):
        return value
    copied = value.clone()
    if hasattr(value, "_unquantize"):  # a straight-through draw carries the soft one, whose density counts
        copied._unquantize = value._unquantize.clone()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            msg["fn"].log_prob(copied)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"site '{msg['name']}': expected a density at any value where samples are held fixed, "
            f"got {type(base).__name__} with a transform that has no inverse"
        ) from error
    return copied if hasattr(value, "_unquantize") else copied.clone()


class CommonNoise(Messenger):
    """Let all particles of a datapoint share the base noise of reparameterised sites (common random numbers).

    Each particle keeps its own distribution, so the multi-sample bound stays a bound: E log mean w <= log E mean
    w. The particles' weights then differ by their discrete sites, and less by their noise. A reparameterised site
    must be of a location-scale family.

    Args:
        max_plate_nesting: number of plate dimensions; the particles are left of them.
    """

    def __init__(self, max_plate_nesting: int) -> None:
        self.particle_dim = -max_plate_nesting - 1
        self.noise: dict[str, Tensor] = {}  # of the particles before, when they run one after the other

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg) or not msg["fn"].has_rsample:
            return
        base = innermost(msg["fn"], through_transforms=False)
        if isinstance(base, Delta):  # a function of other draws, without noise of its own
            return
        if not is_location_scale(base):
            raise ValueError(
                f"site '{msg['name']}': expected a location-scale family for common noise "
                f"({', '.join(LOCATION_SCALE)}), whose noise has no parameters, got {type(base).__name__}"
            )
        event = len(base.batch_shape) - len(msg["fn"].batch_shape)
        decide(msg, base.loc + base.scale * self._noise(msg["name"], base, self.particle_dim - event))

    def _noise(self, name: str, base: Any, particle_dim: int) -> Tensor:
        """Draw once for all particles and all values of enumerated sites."""
        if name not in self.noise:
            noise = _base_noise(base)
            for dim in range(noise.dim() + particle_dim + 1):  # none for a single particle
                noise = noise.narrow(dim, 0, 1)
            self.noise[name] = noise
        return self.noise[name]


class RepeatedNoise(CommonNoise):
    """Let the particles of later runs have the base noise of the K particles of the first, again and again.

    Particle k of the first run shares it with particles k, K + k, 2K + k, ... of a later one.
    """

    def _noise(self, name: str, base: Any, particle_dim: int) -> Tensor:
        if name not in self.noise:
            self.noise[name] = _base_noise(base)
        noise = self.noise[name]
        times = base.batch_shape[particle_dim] // noise.shape[particle_dim]
        return torch.cat([noise] * times, particle_dim)


def _base_noise(fn: Any) -> Tensor:
    """Draw from the standardised distribution."""
    with torch.no_grad():
        noise: Tensor = (fn.sample() - fn.loc) / fn.scale
    return noise


class ShareDiscrete(Messenger):
    """Let consecutive particles, `group` at a time, share the values of the sites that are not reparameterised."""

    def __init__(self, group: int, max_plate_nesting: int) -> None:
        self.group, self.particle_dim = group, -max_plate_nesting - 1
        self.values: dict[str, tuple[int, Tensor]] = {}  # when particles run one after the other: uses, value

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg) or msg["fn"].has_rsample:
            return
        value = draw(msg)
        dim = value.dim() - msg["fn"].event_dim + self.particle_dim
        if dim >= 0 and value.shape[dim] > 1:
            first = value.index_select(dim, torch.arange(0, value.shape[dim], self.group, device=value.device))
            decide(msg, first.repeat_interleave(self.group, dim))
            return
        uses, earlier = self.values.get(msg["name"], (0, value))
        value = value if uses % self.group == 0 else earlier
        self.values[msg["name"]] = (uses + 1, value)
        decide(msg, value)


Values = Callable[[Any], Tensor]  # from a distribution to some of its values


class EnumerateValues(Messenger):
    """Give one site several values, in a new dimension left of the particles'.

    Args:
        site: its name.
        values: from the site's distribution, of batch shape [K, plates], to values [S, *batch, *event], where
            batch broadcasts to the distribution's.
        dims: number of dimensions right of the new one: plates, particles, and those of sites enumerated later.
    """

    def __init__(self, site: str, values: Values, dims: int) -> None:
        self.site, self.values, self.dims = site, values, dims

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] == self.site and is_open(msg):
            check_finite_support(msg, " to choose values from")
            value = self.values(msg["fn"])
            shape = value.shape[: value.dim() - msg["fn"].event_dim]
            event = value.shape[len(shape) :]
            padding = (1,) * (self.dims + 1 - len(shape))
            decide(msg, value.reshape(shape[0], *padding, *shape[1:], *event))


def fixed(values: Tensor) -> Values:
    """Give every particle and datapoint the same values [S]."""
    return lambda fn: values
