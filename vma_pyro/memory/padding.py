"""Memories of different sizes in one batch: the shorter ones are padded, and padding counts for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vma_pyro.memory.checks import looks_at

if TYPE_CHECKING:
    from vma_pyro.memory.memory import Memory


def stacked(memories: Sequence[Memory]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Entries [B, S, *E], labels [B, S] (-1 on padding) and mask [B, S] of shared memories, S the most entries."""
    check_same_kind(memories)
    real = [m.entries if m.mask is None else m.entries[m.mask] for m in memories]
    ones = [torch.ones(len(entries), dtype=torch.bool, device=entries.device) for entries in real]
    # All have labels, or none.
    of_each = [(m.labels.long(), m.mask) for m in memories if m.labels is not None]
    labels = [labels if mask is None else labels[mask] for labels, mask in of_each]
    return _rows(real, 0), _rows(labels, -1) if labels else None, _rows(ones, 0)


def check_same_kind(memories: Sequence[Memory]) -> None:
    """Refuse memories that do not fit into one tensor."""
    if not memories:
        raise ValueError("memories: expected at least one, got none")
    expected = _kind(memories[0])
    for b, memory in enumerate(memories):
        if not memory.is_shared:
            raise ValueError(f"memories[{b}]: expected one memory [S, *E], got {list(memory.entries.shape)}")
        for name, value in _kind(memory).items():
            if value != expected[name]:
                raise ValueError(f"memories[{b}]: expected {name} {expected[name]} as the first has, got {value}")


def _kind(memory: Memory) -> dict[str, Any]:
    return {
        "entries of shape": list(memory.entry_shape),
        "type": memory.entries.dtype,
        "device": memory.entries.device,
        "labels:": "none" if memory.labels is None else memory.labels.dtype,
    }


def _rows(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors of different lengths as the rows of one, with a value behind the shorter ones."""
    size = max(map(len, tensors))
    return torch.stack([torch.cat([t, t.new_full((size - len(t), *t.shape[1:]), value)]) for t in tensors])


def filled(entries: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """The entries, with each memory's first one in place of its padding.

    So nothing that networks make of padding is NaN, whose gradient would be NaN in spite of a weight of 0; and it
    needs no encoding of its own.
    """
    lead = entries.shape[: entries.dim() - event_dim]
    if mask.dtype != torch.bool:
        raise ValueError(f"memory.mask: expected torch.bool, True for an entry, got {mask.dtype}")
    if mask.shape != lead:
        raise ValueError(f"memory.mask: expected shape {list(lead)}, one value per entry, got {list(mask.shape)}")
    if mask.device != entries.device:
        raise ValueError(f"memory.mask: expected on {entries.device} as the entries are, got {mask.device}")
    if looks_at("mask", mask) and not bool(mask.any(-1).all()):
        where = "" if mask.dim() == 1 else f" of datapoint {int((~mask.any(-1)).int().argmax())}"
        raise ValueError(f"memory.mask: expected at least one entry in every memory, got none in that{where}")
    rows = mask.int().argmax(-1)  # the first of the largest
    if len(lead) == 2:
        rows = rows + lead[1] * torch.arange(lead[0], device=rows.device)
    first = entries.flatten(0, len(lead) - 1).index_select(0, rows.reshape(-1))
    real = mask.reshape(*lead, *(1 for _ in range(event_dim)))
    return torch.where(real, entries, first.unsqueeze(1) if len(lead) == 2 else first)


def centred(features: Any, mask: Tensor) -> Any:
    """The features, with the mean key of its memory's entries in place of a key of padding.

    The mean over all keys is then that over the entries alone: who centres on it need not know of the mask.
    """
    if "key" not in getattr(features, "_fields", ()):
        return features
    real = mask.unsqueeze(-1)  # [..., S, 1]
    number = real.sum(-2, keepdim=True)
    mean = torch.where(real, features.key, 0.0).sum(-2, keepdim=True) / number
    return features._replace(key=torch.where(real, features.key, mean.to(features.key.dtype)))
