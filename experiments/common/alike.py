"""Whether two models may be subtracted: a difference means something if they differ in one thing only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine

from common.protocols import first_of
from vma_pyro.data import Episode
from vma_pyro.evaluation import undisturbed
from vma_pyro.models import Pair, updates_of
from vma_pyro.training.faults import innermost, parameters_of

# What training must have in common beside its number of updates, where both say it.
SHARED = ("data", "queries", "particles", "optimizer", "augment", "width", "latent_dim")

Facts = Mapping[str, Any]


def difference(
    pairs: tuple[Pair, Pair], facts: tuple[Facts, Facts], episode: Episode, *, but_for: str = ""
) -> str | None:
    """Why the likelihoods of two models may not be subtracted, in one line; None if they may.

    Args:
        pairs: model and guide of both, on the device of the episode.
        facts: about the training of both (updates, cycles, data, ...).
        episode: on which their likelihoods are looked at.
        but_for: the fact in which they are meant to differ.
    """
    one, other = facts
    if count_updates(one) != count_updates(other):
        return (
            f"updates: expected as many for both models, got {describe_updates(one)} and {describe_updates(other)}"
        )
    for name in SHARED:
        if name != but_for and name in one and name in other and one[name] != other[name]:
            return f"{name}: expected the same for both models, got {one[name]} and {other[name]}"
    return compare_likelihoods(pairs, episode)


def check(pairs: tuple[Pair, Pair], facts: tuple[Facts, Facts], episode: Episode, *, but_for: str = "") -> None:
    """Refuse models that may not be subtracted.

    Raises:
        ValueError: they may not, and why.
    """
    found = difference(pairs, facts, episode, but_for=but_for)
    if found is not None:
        raise ValueError(found)


class Group:
    """Models that are compared with the first of them.

    Attributes:
        training: name of each model to facts about its training.

    Args:
        episode: on which their likelihoods are looked at.
        but_for: the fact in which they are meant to differ.
    """

    def __init__(self, episode: Episode, *, but_for: str = "") -> None:
        self.episode, self.but_for = episode, but_for
        self.training: dict[str, dict[str, Any]] = {}
        self._first: Pair | None = None

    @property
    def updates(self) -> int | None:
        """Updates of the first model, as many as the others are to make; None while there is none."""
        return next(iter(self.training.values())).get("updates") if self.training else None

    def add(self, name: str, pair: Pair, facts: dict[str, Any]) -> None:
        """Take a model in.

        Raises:
            ValueError: it may not be subtracted from the first one, and why.
        """
        self.training[name] = facts
        self._first = self._first or pair
        first = next(iter(self.training.values()))
        check((self._first, pair), (first, facts), self.episode, but_for=self.but_for)


def count_updates(facts: Facts) -> int:
    """Updates in all cycles of training."""
    return sum(cycle.get("updates", 0) for cycle in (*facts.get("cycles", ()), facts))


def describe_updates(facts: Facts) -> str:
    """The updates in words."""
    early = ", stopped early" if facts.get("stopped_early") else ""
    return (updates_of(facts) if "updates" in facts else "an unknown number") + early


def compare_likelihoods(pairs: tuple[Pair, Pair], episode: Episode) -> str | None:
    """How p(x | z, m) of two models differs, beside what their networks give it; None if it does not."""
    first, second = (trace_x(pair, episode) for pair in pairs)
    if not torch.equal(first["value"], second["value"]):
        return "site 'x': expected both models to score the same values, got others"
    ours, theirs = traits(first), traits(second)
    for name, value in ours.items():
        # What is a number in one model and comes from the networks in the other is another likelihood as well.
        if theirs.get(name) != value:
            return f"site 'x': expected the same {name} in both models, got {value} and {theirs.get(name)}"
    return None


def trace_x(pair: Pair, episode: Episode) -> Any:
    """The site `x` of a model on two images of an episode."""
    model, guide = pair
    memory, x, _ = first_of(episode, 2)
    with undisturbed(model, guide, seed=0), torch.enable_grad():  # a gradient tells what is learned
        trace = poutine.trace(guide).get_trace(memory, x)
        return poutine.trace(poutine.replay(model, trace=trace)).get_trace(memory, x).nodes["x"]


def traits(site: Any) -> dict[str, Any]:
    """The kind of a site's distribution, and all of it that is neither computed nor learned."""
    kinds, fn = [type(site["fn"]).__name__], site["fn"]
    while fn is not innermost(fn):
        kinds += [type(t).__name__ for t in getattr(fn, "transforms", ())]
        fn = fn.base_dist
        kinds.append(type(fn).__name__)
    found: dict[str, Any] = {"likelihood": " of ".join(k for k in kinds if k != "Independent")}
    found["event shape"] = list(site["fn"].event_shape)
    found["scale of the log probability"] = float(torch.as_tensor(site["scale"]).mean())
    found["mask"] = site["mask"] is None
    for name, value in parameters_of(fn):
        fixed = not value.requires_grad and bool((value == value.flatten()[0]).all())
        found[name] = value.flatten()[0].item() if fixed else "what the networks give, or is learned"
    plain = {
        n: v for n, v in vars(fn).items() if isinstance(v, bool | int | float | str) and not n.startswith("_")
    }
    return found | plain
