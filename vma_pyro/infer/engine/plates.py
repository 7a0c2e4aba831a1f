"""The place of particles, of datapoints, and of everything to be summed in a site's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.util import site_is_subsample
from torch import Tensor

PyroProgram = Callable[..., Any]
Site = Any  # a node of a trace; Pyro's own type leaves most of its fields open
PARTICLES = "num_particles_vectorized"  # Pyro's own name of the plate


def particle_plate(num_particles: int, max_plate_nesting: int) -> Callable[[PyroProgram], PyroProgram]:
    """Make the plate of the particles, left of all plates of the program."""
    return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)


def sample_sites(trace: poutine.Trace) -> Iterable[Site]:
    """Iterate over the random sites, observed or not; `pyro.deterministic` is not random."""
    nodes: Iterable[Site] = trace.nodes.values()
    for site in nodes:
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield site


def is_given(site: Site) -> bool:
    """Tell whether a site's value is data; a `pyro.factor` is observed as well, but has no value."""
    return site["is_observed"] and not isinstance(site["fn"], Unit)


def drawn_by(guide_trace: poutine.Trace) -> poutine.Trace:
    """Keep the sites whose values the model takes over; one whose value is given has it in the model as well."""
    if not guide_trace.observation_nodes:
        return guide_trace
    drawn = poutine.Trace()
    for name, site in guide_trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"]:
            drawn.add_node(name, **site)
    return drawn


def is_random_subsample(site: Site) -> bool:
    """Tell whether a site draws the elements of its plate; a plate whose elements are given has a site, too."""
    if not site_is_subsample(site):
        return False
    size: int | None = site["fn"].subsample_size
    return size is not None and size < site["fn"].size


def _sequential(site: Site) -> str:
    names = [frame.name for frame in site["cond_indep_stack"] if not frame.vectorized]
    return f" (and in the sequential plates {names})" if names else ""


class Layout:
    """The dimensions of a site's log probability: [leading, particle, plates].

    There are `leading` dimensions of enumerated sites, and `max_plate_nesting` of plates, without the particles'.
    Elements of the `batch_plates` are the datapoints; without any the whole program is one.
    """

    def __init__(self, batch_plates: tuple[str, ...], max_plate_nesting: int, leading: int = 0) -> None:
        self.batch_plates, self.nesting, self.leading = batch_plates, max_plate_nesting, leading
        self.rank = leading + 1 + max_plate_nesting

    def of_program(self, *traces: poutine.Trace) -> Layout:
        """Return this layout, or that of one datapoint for programs without any plate, also a sequential one."""
        frames = (f for trace in traces for site in sample_sites(trace) for f in site["cond_indep_stack"])
        has_plates = any(frame.name != PARTICLES for frame in frames)
        return self if has_plates or not self.batch_plates else Layout((), self.nesting, self.leading)

    def subsampling_scale(self, site: Site) -> float:
        """Compute full size over subsample size, over the batch plates."""
        scale = 1.0
        for frame in self._frames(site):
            scale *= (frame.full_size or frame.size) / frame.size
        return scale

    def per_datapoint(self, site: Site, log_prob: Tensor) -> Tensor:
        """Sum over all but [leading, particle, batch plates]; returns [*leading, K, *batch]."""
        kept, rest = self._gathered(site, log_prob)
        return kept.sum(rest) if rest else kept

    def any_per_datapoint(self, site: Site, values: Tensor | bool) -> Tensor | bool:
        """Tell whether any value of the site is true: a boolean, or what broadcasts to [*leading, K, *batch]."""
        if isinstance(values, bool):
            return values
        kept, rest = self._gathered(site, values)
        return kept.amax(rest) if rest else kept

    def by_element(self, site: Site, values: Tensor, inner: int) -> Tensor:
        """Gather values [particle, plates, inner dimensions] as [K, B, D]: D elements for each datapoint."""
        values = values.reshape((1,) * (self.rank + inner - values.dim()) + values.shape)
        order, rest = self._order(site)
        moved = values.permute(*order, *range(self.rank, self.rank + inner))
        batch = moved.shape[self.leading + 1 : self.rank - len(rest)]
        return moved.reshape(*moved.shape[: self.leading + 1], math.prod(batch), -1)

    def datapoints_first(self, site: Site, values: Tensor) -> Tensor:
        """Move what a site draws, with event dimensions on the right, to [particle, batch plates, rest, event]."""
        order, _ = self._order(site)
        return values.permute(*order, *range(self.rank, values.dim()))

    def in_place(self, site: Site, values: Tensor) -> Tensor:
        """Undo `datapoints_first`."""
        order, _ = self._order(site)
        return values.permute(*(order.index(d) for d in range(self.rank)), *range(self.rank, values.dim()))

    def element_index(self, site: Site, shape: Sequence[int], inner: int) -> Tensor:
        """Number the elements of a datapoint as `by_element` does, in the dimensions [plates, inner dimensions].

        `shape` is that of the plates and inner dimensions, where the datapoints' own have any size.
        """
        shape = (1,) * (self.nesting + inner - len(shape)) + tuple(shape)
        _, rest = self._order(site)
        inside = {dim - self.leading - 1 for dim in rest}
        sizes = [n if d in inside or d >= self.nesting else 1 for d, n in enumerate(shape)]
        return torch.arange(math.prod(sizes)).reshape(sizes)

    def flat(self, values: Tensor) -> Tensor:
        """Flatten values [*leading, K, *batch] to [*leading, K, B]."""
        return values.reshape(*values.shape[: self.leading + 1], -1)

    def spread(self, site: Site, values: Tensor) -> Tensor:
        """Move values [*leading, K, *batch] to the dimensions where the site's own log_prob has them."""
        order, rest = self._order(site)
        values = values.reshape(*values.shape, *(1 for _ in rest))
        return values.permute(*(order.index(d) for d in range(self.rank)))

    def _frames(self, site: Site) -> list[Any]:
        """Find the frames of the batch plates, in the order in which they were named."""
        frames = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        missing = [name for name in self.batch_plates if name not in frames]
        if missing:
            inside = sorted(set(frames) - {PARTICLES})
            others = f"batch_plates={tuple(inside)} names the datapoints' plates, " if inside else ""
            raise ValueError(
                f"site '{site['name']}': expected inside the batch plates {list(self.batch_plates)}, "
                f"found in {inside}{_sequential(site)}; its log weight belongs to no single datapoint: {others}"
                "batch_plates=() gives the whole data set one weight per particle"
            )
        return [frames[name] for name in self.batch_plates]

    def _order(self, site: Site) -> tuple[list[int], list[int]]:
        """Order all dimensions, [leading, particle, batch plates] first; returns also the rest."""
        lead = list(range(self.leading + 1))
        batch = [self.rank + frame.dim for frame in self._frames(site)]
        rest = [d for d in range(self.leading + 1, self.rank) if d not in batch]
        return [*lead, *batch, *rest], rest

    def _gathered(self, site: Site, value: Tensor) -> tuple[Tensor, list[int]]:
        """Permute a value to [leading, particle, batch plates, rest]; returns also where the rest is."""
        order, rest = self._order(site)
        value = value.reshape((1,) * (self.rank - value.dim()) + value.shape)
        return value.permute(*order), list(range(self.rank - len(rest), self.rank))
