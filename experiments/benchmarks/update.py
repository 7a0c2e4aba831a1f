"""One parameter update, the unit of most benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vma_pyro.data import Episode, EpisodeSampler, glyphs
from vma_pyro.training.captured import Captured

SHOTS = 4


def episodes(size: int, queries: int, device: torch.device, *, own_memory: bool = False) -> list[Episode]:
    """A few of |M| = size to go round, on the device: sampling them is not timed.

    Raises:
        ValueError: a size that is no multiple of `SHOTS`.
    """
    classes, left = divmod(size, SHOTS)
    if left or classes < 1:
        raise ValueError(f"memory: expected a multiple of {SHOTS}, got {size}")
    shape: dict[str, Any] = {"classes": classes, "shots": SHOTS, "queries": queries}
    # Enough characters that one entry in twenty, and not more, is repeated among the memories of all queries.
    characters = glyphs.load(classes=max(60, classes, size * queries // 2 if own_memory else 0))
    sampler = EpisodeSampler(characters, **shape, shared_memory=not own_memory, seed=0)
    return [sampler.sample().to(device) for _ in range(4)]


def updates(
    loss: Callable[[Episode], Tensor], parameters: Iterable[nn.Parameter], rounds: Sequence[Episode]
) -> Callable[[], None]:
    """One update of Adam per call.

    Args:
        loss: from an episode to minus the bound, summed over images.
        parameters: what is updated.
        rounds: the episodes, one after the other, again and again.
    """
    optimizer = torch.optim.Adam(parameters, 1e-4, fused=True)
    endless = itertools.cycle(rounds)

    def update() -> None:
        episode = next(endless)
        optimizer.zero_grad()
        (loss(episode) / len(episode.x)).backward()
        optimizer.step()

    return update


def captured_updates(loss_fn: nn.Module, rounds: Sequence[Episode]) -> Callable[[], None]:
    """The same as `fit` makes them on a CPU: recorded at the first call, then replayed.

    Raises:
        ValueError: they cannot be recorded.
    """

    def refuse(why: str) -> None:
        raise ValueError(why)

    captured = Captured(loss_fn, note=refuse, wait=0)
    optimizer = torch.optim.Adam(loss_fn.parameters(), 1e-4, fused=True)
    endless = itertools.cycle(rounds)

    def update() -> None:
        episode = next(endless)
        captured(episode.memory, episode.x)
        optimizer.step()

    return update


def updates_with(loss_fn: nn.Module, rounds: Sequence[Episode]) -> Callable[[], None]:
    """One update per call of what a Pyro objective of (memory, x) trains."""
    return updates(lambda e: loss_fn(e.memory, e.x), loss_fn.parameters(), rounds)
