"""Effect handlers that choose how a guide's sites are drawn; each leaves every single particle's distribution
right.

They stand outside the particle plate, so that a site's distribution has all its plate dimensions when they see it.
Sites whose value is already decided (observed, replayed, conditioned) are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

Message = Any  # what Pyro passes to handlers at a site
Chooser = Callable[[Any], Tensor]
# Exactly these: a draw is loc + scale * noise, and no parameter decides on the law of the noise.
LOCATION_SCALE = ("Normal", "Laplace", "Cauchy")


def is_location_scale(fn: Any) -> bool:
    """Whether a distribution is one of these families itself, and no class derived from them."""
    name = type(fn).__name__
    families = (getattr(torch.distributions, name, None), getattr(pyro.distributions, name, None))
    return name in LOCATION_SCALE and type(fn) in families


def is_drawn(msg: Message) -> bool:
    """Whether this site, after it has run, has a random value of its own."""
    return (
        msg["type"] == "sample"
        and not msg["is_observed"]
        and hasattr(msg["fn"], "batch_shape")
        and not msg["infer"].get("_deterministic")
        and type(msg["fn"]).__name__ != "_Subsample"
    )


def is_open(msg: Message) -> bool:
    """Whether this site still waits for a random value."""
    return (
        not msg["done"]
        and msg["value"] is None
        and not msg["is_observed"]
        and hasattr(msg["fn"], "batch_shape")
        and not msg["infer"].get("_deterministic")
        and type(msg["fn"]).__name__ != "_Subsample"
    )


def decide(msg: Message, value: Tensor) -> None:
    """Give the site its value; handlers further out and Pyro's own sampling then leave it."""
    msg["value"], msg["done"] = value, True


def check_no_own_mask(msg: Message) -> None:
    """Refuse `fn.mask(...)`, whose log_prob is not the probability of drawing; a mask handler is fine."""
    if isinstance(msg["fn"], MaskedDistribution):
        raise ValueError(
            f"site '{msg['name']}': expected its mask from poutine.mask, as its values are chosen, "
            "got a masked distribution"
        )


class ChooseValues(Messenger):
    """Give one site chosen values, in a new dimension left of the particles'.

    Args:
        site: its name.
        choose: from the site's distribution, with batch shape [K, plates], to values [S, *batch, *event], where
            batch broadcasts to the distribution's.
        dims: number of dimensions right of the new one: plates, particles, and those of sites chosen later.
    """

    def __init__(self, site: str, choose: Chooser, dims: int) -> None:
        super().__init__()
        self.site, self.choose, self.dims = site, choose, dims

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] == self.site and is_open(msg):
            if not getattr(msg["fn"], "has_enumerate_support", False):
                raise ValueError(
                    f"site '{self.site}': expected a finite support to choose values from, "
                    f"got {type(msg['fn']).__name__}"
                )
            check_no_own_mask(msg)
            try:
                value = self.choose(msg["fn"])
            except NotImplementedError as error:  # a Binomial with a total count for each datapoint
                raise ValueError(
                    f"site '{self.site}': expected a finite support, the same for all datapoints, got "
                    f"{type(msg['fn']).__name__} whose support cannot be enumerated"
                ) from error
            shape = value.shape[: value.dim() - msg["fn"].event_dim]
            event = value.shape[len(shape) :]
            padding = (1,) * (self.dims + 1 - len(shape))
            decide(msg, value.reshape(shape[0], *padding, *shape[1:], *event))


def fixed(values: Tensor) -> Chooser:
    """The same values [S] for every particle and datapoint."""
    return lambda fn: values


def whole_support(fn: Any) -> Tensor:
    """All values of a distribution with finite support [S, 1, ..., 1, *event]."""
    return fn.enumerate_support(expand=False)


class DetachValues(Messenger):
    """Draw every site without a gradient through its value, as wake-sleep needs."""

    def _pyro_sample(self, msg: Message) -> None:
        if msg["type"] == "sample" and is_open(msg):
            _check_density(msg)
            with torch.no_grad():
                value = msg["fn"](*msg["args"], **msg["kwargs"])
            decide(msg, _forgotten(msg, value))


def _check_density(msg: Message) -> None:
    """A point whose place is learned has no density that could learn it."""
    base = msg["fn"]
    while hasattr(base, "base_dist") and not isinstance(base, pyro.distributions.Delta):
        base = base.base_dist
    if isinstance(base, pyro.distributions.Delta) and (base.v.requires_grad or base.log_density.requires_grad):
        raise ValueError(
            f"site '{msg['name']}': expected a density where samples are held fixed, got Delta, whose parameters "
            "would learn nothing; use an objective that differentiates through draws, such as MultiSampleELBO"
        )


def _forgotten(msg: Message, value: Tensor) -> Tensor:
    """A drawn value that the distribution takes for any other.

    A flow that remembers its draws (`cache_size`) hands back what it had without a gradient, and log q would have
    none in its parameters: it has to go the way from the value to the noise again.
    """
    base = msg["fn"]
    while hasattr(base, "base_dist") and not hasattr(base, "transforms"):
        base = base.base_dist
    if not hasattr(base, "transforms"):
        return value
    copied = value.clone()
    if hasattr(value, "_unquantize"):  # a straight-through draw carries the soft one that its density is of
        copied._unquantize = value._unquantize.clone()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            msg["fn"].log_prob(copied)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"site '{msg['name']}': expected a density at any value where samples are held fixed, "
            f"got {type(base).__name__} with a transform that has no inverse"
        ) from error
    return copied.clone() if not hasattr(value, "_unquantize") else copied


class Defended(TorchDistribution):
    """(1 - share) q + share * uniform, over the values that q does not rule out (a defensive mixture)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, guide: Any, share: float) -> None:
        self.guide, self.share = guide, share
        # What has no probability at all, such as padding of a memory, is nothing to propose.
        self.allowed = guide.log_prob(guide.enumerate_support(expand=False)).detach() > -math.inf  # [S, *batch]
        self.number = self.allowed.sum(0)
        super().__init__(guide.batch_shape, guide.event_shape, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """From q, or from the uniform distribution."""
        values = self.guide.enumerate_support(expand=False)
        pick = torch.randint(len(values), self.batch_shape, device=values.device)
        u = torch.rand(self.batch_shape, device=values.device)
        lucky = u < self.share
        # What q rules out gives way to another value; of the lucky ones u / share is uniform as well.
        number = self.number.expand(self.batch_shape)
        rank = (u / max(self.share, 1e-9) * number).long().minimum(number - 1)
        allowed = self.allowed.expand(-1, *self.batch_shape)
        order = allowed.int().argsort(dim=0, descending=True, stable=True)
        pick = torch.where(allowed.gather(0, pick[None])[0], pick, order.gather(0, rank[None])[0])
        uniform = values.flatten(1, len(self.batch_shape))[:, 0][pick]  # [*batch, *event]
        lucky = lucky.reshape(*lucky.shape, *(1 for _ in self.event_shape))
        return torch.where(lucky, uniform, self.guide.sample())

    def log_prob(self, value: Tensor) -> Tensor:
        """Of the mixture."""
        log_q = self.guide.log_prob(value) + math.log(1 - self.share)
        possible = log_q > -math.inf
        log_uniform = math.log(self.share) - self.number.log().to(log_q.dtype)
        # The gradient of a sum of two zeros would be NaN.
        return torch.where(possible, torch.logaddexp(torch.where(possible, log_q, 0.0), log_uniform), -math.inf)


class Defensive(Messenger):
    """Draw the discrete sites with finite support from `Defended`."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def _pyro_sample(self, msg: Message) -> None:
        if msg["type"] == "sample" and is_open(msg) and not msg["fn"].has_rsample:
            if not msg["fn"].has_enumerate_support:
                raise ValueError(
                    f"site '{msg['name']}': expected a finite support for a defensive proposal, "
                    f"got {type(msg['fn']).__name__}"
                )
            check_no_own_mask(msg)
            msg["fn"] = Defended(msg["fn"], self.share)


class CommonNoise(Messenger):
    """All particles of a datapoint share the base noise of their reparameterised sites (common random numbers).

    Each particle keeps its own distribution, so the multi-sample bound stays a bound: E log mean w <= log E mean
    w. Differences between the particles' weights then tell of their discrete sites, less of their noise.

    Args:
        max_plate_nesting: number of plate dimensions; the particles are left of them.

    Raises:
        ValueError: a reparameterised site of another kind than a location-scale family.
    """

    def __init__(self, max_plate_nesting: int) -> None:
        super().__init__()
        self.particle_dim = -max_plate_nesting - 1
        self.noise: dict[str, Tensor] = {}  # of the particles before, when they run one after the other

    def _pyro_sample(self, msg: Message) -> None:
        if msg["type"] != "sample" or not is_open(msg) or not msg["fn"].has_rsample:
            return
        base = msg["fn"]
        while hasattr(base, "base_dist") and not hasattr(base, "transforms"):
            base = base.base_dist  # Independent, masked, expanded
        if isinstance(base, pyro.distributions.Delta):  # a function of other draws, without noise of its own
            return
        if not is_location_scale(base):
            raise ValueError(
                f"site '{msg['name']}': expected a location-scale family for common noise "
                f"({', '.join(LOCATION_SCALE)}), whose noise has no parameters, got {type(base).__name__}"
            )
        event = len(base.batch_shape) - len(msg["fn"].batch_shape)
        if msg["name"] not in self.noise:
            self.noise[msg["name"]] = _base_noise(base, self.particle_dim - event)
        decide(msg, base.loc + base.scale * self.noise[msg["name"]])


def _base_noise(fn: Any, particle_dim: int) -> Tensor:
    """A draw of the standardised distribution, the same for all particles and all values of chosen sites."""
    with torch.no_grad():
        noise: Tensor = (fn.sample() - fn.loc) / fn.scale
    for dim in range(noise.dim() + particle_dim + 1):  # none for a single particle
        noise = noise.narrow(dim, 0, 1)
    return noise


class ShareDiscrete(Messenger):
    """Consecutive particles, `group` at a time, share the values of the sites that are not reparameterised.

    Args:
        group: particles per value.
        max_plate_nesting: number of plate dimensions; the particles are left of them.
    """

    def __init__(self, group: int, max_plate_nesting: int) -> None:
        super().__init__()
        self.group, self.particle_dim = group, -max_plate_nesting - 1
        self.values: dict[str, tuple[int, Tensor]] = {}  # when particles run one after the other: uses, value

    def _pyro_sample(self, msg: Message) -> None:
        if msg["type"] != "sample" or not is_open(msg) or msg["fn"].has_rsample:
            return
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        dim = value.dim() - msg["fn"].event_dim + self.particle_dim
        if dim >= 0 and value.shape[dim] > 1:
            first = value.index_select(dim, torch.arange(0, value.shape[dim], self.group, device=value.device))
            decide(msg, first.repeat_interleave(self.group, dim))
            return
        uses, earlier = self.values.get(msg["name"], (0, value))
        value = value if uses % self.group == 0 else earlier
        self.values[msg["name"]] = (uses + 1, value)
        decide(msg, value)
