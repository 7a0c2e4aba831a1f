"""Particles whose discrete values are coupled: dependent among themselves, each alone distributed like q.

A site is coupled where all particles draw it from the same distribution, that is where no draw before it differs
between them. There its elements (of a vector, or of plates inside the datapoint) are coupled one by one. Where
particles differ, as in the second of two layers, each draws for itself: given what came before, its value then
says nothing of the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.handlers import Message, decide, is_drawn, is_open
from vma_pyro.infer.engine.particles import SiteScore

CATEGORICAL = (torch.distributions.Categorical, torch.distributions.OneHotCategorical)


class Drawn(NamedTuple):
    """Coupled values of the elements of a site, and what the coupling remembers of the draw.

    Attributes:
        values: [K, *elements], with the dimensions of one event behind them.
        memory: whatever the estimator that belongs to the coupling needs, as tensors [..., *elements].
    """

    values: Float[Tensor, " K *elements"]
    memory: Any = None


class Coupling(ABC):
    """A joint distribution of K particles at each element of a site.

    Attributes:
        families: the distributions that it can couple.
        expected: the same in words, for errors.
    """

    families: tuple[type, ...]
    expected: str

    @abstractmethod
    def draw(self, fn: Any, number: int) -> Drawn:
        """Draw so many values of each element of `fn`, a distribution [*elements] that all particles share."""


class Couple(Messenger):
    """Draws the discrete sites of a guide by a coupling, where all particles share the distribution.

    `watch` must stand inside the particle plate, where a distribution still shows whether particles differ.
    """

    def __init__(self, coupling: Coupling, max_plate_nesting: int) -> None:
        self.coupling, self.nesting = coupling, max_plate_nesting
        self.watch = Watch(max_plate_nesting)
        self.drawn: dict[str, Drawn] = {}
        self.left: dict[str, str] = {}  # sites that are not coupled, and why

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg) or msg["fn"].has_rsample:
            return
        name, (fn, _) = msg["name"], elementary(msg["fn"])
        if not isinstance(fn, self.coupling.families) or not is_plain(fn):
            self.left[name] = f"expected {self.coupling.expected}, got {type(fn).__name__}"
        elif name not in self.watch.shared:
            self.left[name] = (
                "expected a distribution that is the same for all particles, got one that earlier draws decide"
            )
        else:
            drawn = self.coupling.draw(of_one_particle(fn), msg["fn"].batch_shape[-self.nesting - 1])
            self.drawn[name] = drawn
            decide(msg, drawn.values)

    def check_any(self, what: str) -> None:
        """Refuse a guide of which no discrete site is coupled, as `what` would silently be another estimator."""
        for name, reason in self.left.items():
            if not self.drawn:
                raise ValueError(
                    f"site '{name}': {reason}, which {what} cannot couple; use RLOO or MultiSampleELBO"
                )


class Watch(Messenger):
    """Notes at which sites all particles share the distribution; it stands inside the particle plate."""

    def __init__(self, max_plate_nesting: int) -> None:
        self.nesting = max_plate_nesting
        self.shared: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        if is_drawn(msg) and len(msg["fn"].batch_shape) <= self.nesting:
            self.shared.add(msg["name"])


def is_plain(fn: Any) -> bool:
    """Tell whether a distribution is of Torch or Pyro itself: a class of one's own may draw otherwise."""
    return type(fn).__module__.startswith(("torch.distributions.", "pyro.distributions."))


def of_one_particle(fn: Any) -> Any:
    """Take a distribution of elements [K, *elements], the same for all K, for one of them, without gradients."""
    return type(fn)(logits=fn.logits[0].detach(), validate_args=False)


def positions(fn: Any, value: Tensor) -> Int64[Tensor, " K *elements"]:
    """Find the positions of drawn values among those of a categorical distribution."""
    return value.argmax(-1) if isinstance(fn, torch.distributions.OneHotCategorical) else value.long()


def as_values(fn: Any, position: Int64[Tensor, " K *elements"]) -> Tensor:
    """Write positions as values of a categorical distribution, integer or one-hot."""
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return F.one_hot(position, fn.logits.shape[-1]).to(fn.logits.dtype)
    return position


def uniform(number: int, like: Float[Tensor, " *elements"]) -> Float[Tensor, " N *elements"]:
    """Draw noise from 0 to 1 for each element."""
    return torch.rand(number, *like.shape, dtype=like.dtype, device=like.device)


def element_log_probs(score: SiteScore) -> Float[Tensor, "K B D"]:
    """Compute log q of each element of a site, at its values."""
    fn, _ = elementary(score.site["fn"])
    return by_element(score, fn.log_prob(score.site["value"]))


def by_element(score: SiteScore, values: Float[Tensor, " N *elements"]) -> Float[Tensor, "N B D"]:
    """Gather what belongs to the elements of a site by datapoint."""
    return score.layout.by_element(score.site, values, elementary(score.site["fn"])[1])
