"""Evaluating many memories of entries of one bank: the bank is encoded once in a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vma_pyro.data import Episode, NestedEpisodes
from vma_pyro.evaluation.chunks import encoded_by
from vma_pyro.evaluation.estimates import undisturbed
from vma_pyro.memory import Memory
from vma_pyro.memory.selected import SelectedMemory


def encoded_bank(guide: Any, nested: NestedEpisodes, *, device: Any = None) -> NestedEpisodes:
    """Return the same episodes with the bank of all their images encoded, once for memories of all sizes.

    Args:
        guide: whose networks encode; their parameters must not change as long as the episodes are used.
        nested: episodes of test images.
        device: of the guide, where the bank is moved before; None: it is there.
    """
    bank = nested.bank()
    with undisturbed(guide, seed=0):
        return nested.selecting_from(encoded_by(guide, bank if device is None else bank.to(device)))


def encoded(guide: Any, episodes: Iterable[Episode], *, device: Any = None) -> Iterator[Episode]:
    """Pass on episodes whose memories are selected from a bank with that bank encoded, once for all of them.

    Use it for one pass, during which no parameter changes, over a stream such as `vma_pyro.data.NestedEpisodes`,
    where a test image sits in thousands of memories.

    Args:
        guide: whose networks encode.
        episodes: with a `memory` each; other memories are passed on as they are.
        device: of the guide, where the banks are moved before; None: they are there.
    """
    bank: Memory | None = None
    encoding: Memory | None = None
    for episode in episodes:
        memory = episode.memory
        if isinstance(memory, SelectedMemory):
            if encoding is None or memory.bank is not bank:
                bank = memory.bank
                with undisturbed(guide, seed=0):
                    encoding = encoded_by(guide, bank if device is None else bank.to(device))
            rows, labels = memory.rows, memory.labels
            if device is not None:
                rows, labels = rows.to(device), None if labels is None else labels.to(device)
            episode = episode._replace(memory=SelectedMemory(encoding, rows, labels))
        yield episode
