"""One parameter update, the unit of most benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vma_pyro.data import Episode, EpisodeSampler, glyphs
from vma_pyro.training.captured import Captured
from vma_pyro.training.loss import Loss

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


def updates(loss: Loss, rounds: Sequence[Episode]) -> Callable[[], None]:
    """One update of Adam per call.

    Args:
        loss: with the parameters that are updated.
        rounds: the episodes, one after the other, again and again.
    """
    optimizer = torch.optim.Adam(loss.loss_fn.parameters(), 1e-4, fused=True)
    endless = itertools.cycle(rounds)

    def update() -> None:
        episode = next(endless)
        loss.gradient(episode.memory, episode.x)
        optimizer.step()

    return update


def captured(loss_fn: nn.Module, **precision: Any) -> Loss:
    """The loss as `fit` takes it on a CPU, but recorded at the first call; what cannot be recorded is refused.

    Args:
        loss_fn: see `Captured`.
        precision: its `autocast`; float32 without it.

    Raises:
        ValueError: at the first update: it cannot be recorded.
    """

    def refuse(why: str) -> None:
        raise ValueError(why)

    return Captured(loss_fn, note=refuse, wait=0, **precision)
