"""Draws that particles share; each particle keeps its own distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import LOCATION_SCALE, innermost, is_location_scale
from vma_pyro.infer.engine.messages import Message, decide, is_open


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
        if msg["name"] not in self.noise:
            self.noise[msg["name"]] = _base_noise(base, self.particle_dim - event)
        decide(msg, base.loc + base.scale * self.noise[msg["name"]])


def _base_noise(fn: Any, particle_dim: int) -> Tensor:
    """Draw from the standardised distribution once for all particles and all values of enumerated sites."""
    with torch.no_grad():
        noise: Tensor = (fn.sample() - fn.loc) / fn.scale
    for dim in range(noise.dim() + particle_dim + 1):  # none for a single particle
        noise = noise.narrow(dim, 0, 1)
    return noise


class ShareDiscrete(Messenger):
    """Let consecutive particles, `group` at a time, share the values of the sites that are not reparameterised.

    Args:
        group: particles per value.
        max_plate_nesting: number of plate dimensions; the particles are left of them.
    """

    def __init__(self, group: int, max_plate_nesting: int) -> None:
        self.group, self.particle_dim = group, -max_plate_nesting - 1
        self.values: dict[str, tuple[int, Tensor]] = {}  # when particles run one after the other: uses, value

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg) or msg["fn"].has_rsample:
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
