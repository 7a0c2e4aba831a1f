"""Particles that repeat a draw of the guide up to one discrete element, which has another value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.distributions import elementary, is_point, whole_support
from vma_pyro.infer.engine.first_look import undisturbed
from vma_pyro.infer.engine.handlers import Message, check_finite_support, decide, is_open
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.engine.plates import Layout, Site, is_given, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import run


class ChangedSite(NamedTuple):
    """A discrete site whose elements are changed one by one, to all other values.

    Run start + d (S - 1) + j - 1 has element d at the value j places behind the drawn one, 1 <= j < S.

    Attributes:
        name: of the site.
        start: the first of its runs.
        values: S.
        numbers: of each element among those of its datapoint, [plates, inner dimensions].
    """

    name: str
    start: int
    values: int
    numbers: Int64[Tensor, "..."]

    @property
    def end(self) -> int:
        """The first run behind its own."""
        return self.start + self.numbers.numel() * (self.values - 1)

    def table(self, score: SiteScore, number: int) -> tuple[Float[Tensor, "S K B D"], Int64[Tensor, "K B D"]]:
        """Compute log q of all values of every element in the first K runs, and find those that were drawn."""
        layout, site = score.layout, score.site
        fn, inner = elementary(site["fn"])
        fn, value = _first(fn, number), site["value"][:number]
        rows = [layout.by_element(site, fn.log_prob(one), inner) for one in whole_support(fn)]
        drawn = layout.by_element(site, _positions(fn, value), inner)
        return torch.stack([row[:number].expand(drawn.shape) for row in rows]), drawn

    def runs_at(self, drawn: Int64[Tensor, "K B D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Find the run, particle and datapoint where each element has each value, all [S, K, B, D]."""
        K, B, D = drawn.shape
        s, k, b, d = (torch.arange(n, device=drawn.device) for n in (self.values, K, B, D))
        behind = (s[:, None, None, None] - drawn) % self.values
        run = torch.where(behind == 0, 0, self.start + d * (self.values - 1) + behind - 1)
        return run, k[:, None, None].expand(run.shape), b[:, None].expand(run.shape)

    def changed(self, fn: Any, value: Tensor) -> Tensor:
        """Change values [K, plates, event] of a distribution in all ways, [runs, K, plates, event]."""
        fn, _ = elementary(fn)
        position = _positions(fn, value)  # [K, plates, inner]
        shape = (-1, *(1 for _ in position.shape))
        own = torch.arange(self.end - self.start, device=value.device).reshape(shape)
        element, behind = own // (self.values - 1), own % (self.values - 1) + 1
        moved = (position + behind) % self.values
        position = torch.where(self.numbers.to(value.device) == element, moved, position)
        return whole_support(fn).reshape(self.values, *fn.event_shape)[position].to(value.dtype)


class Changes(Messenger):
    """Draws particles (r, k), r outermost: r = 0 draws, every other r repeats it up to its own change.

    What the guide draws after the changed element is drawn anew.

    Args:
        programs: are run once more, to count.
        layout: of the objective.
        number: K.
    """

    def __init__(self, programs: Programs, layout: Layout, number: int) -> None:
        self.number = number
        self.sites: list[ChangedSite] = []
        with undisturbed(programs.guide), poutine.block():
            trace = prune_subsample_sites(run(programs.guide, programs.args, programs.kwargs))
        layout = layout.of_program(trace)
        self.runs = 1
        for site in sample_sites(trace):
            if is_given(site) or site["fn"].has_rsample:
                continue
            fn, inner = elementary(site["fn"])
            index = layout.element_index(site, fn.batch_shape, inner)
            self.sites.append(ChangedSite(site["name"], self.runs, _number_of_values(site), index))
            self.runs = self.sites[-1].end
        if not self.sites:
            raise ValueError(f"guide: expected a discrete site, whose values are changed, found {_names(trace)}")
        self.particles = self.runs * number
        self.elements = sum(site.numbers.numel() for site in self.sites)
        self.changed = 1  # runs that have come to their change

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg) or is_point(msg["fn"]):
            return
        value = handlers.draw(msg).unflatten(0, (self.runs, self.number))
        site = next((site for site in self.sites if site.name == msg["name"]), None)
        parts = [value[: self.changed]]  # drawn anew, but for the first
        if site is not None:
            parts.append(site.changed(msg["fn"], value[0]))
            self.changed = site.end
        parts.append(value[:1].expand(self.runs - self.changed, *value.shape[1:]))
        decide(msg, torch.cat(parts).flatten(0, 1))


def _names(trace: poutine.Trace) -> list[str]:
    return sorted(site["name"] for site in sample_sites(trace))


def _number_of_values(site: Site) -> int:
    fn, _ = elementary(site["fn"])
    check_finite_support({"name": site["name"], "fn": fn}, " to change values in", of="elements")
    return len(whole_support(fn))


def _first(fn: Any, number: int) -> Any:
    """Take a distribution of elements in the first particles, where that is easy; else it stays as it is."""
    if hasattr(fn, "logits") and type(fn).__name__ in ("Categorical", "OneHotCategorical", "Bernoulli"):
        return type(fn)(logits=fn.logits[:number], validate_args=False)
    return fn


def _positions(fn: Any, value: Tensor) -> Int64[Tensor, "..."]:
    """Find the positions of drawn values in the support, [*elements]."""
    same = whole_support(fn).to(value.dtype) == value
    if fn.event_dim:
        same = same.flatten(-fn.event_dim).all(-1)
    return same.long().argmax(0)
