"""Reading rows of a table by address, or their weighted mean; a table is a tensor or tuple of tensors [R, *F]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rows_at(address: Tensor, lead: torch.Size, rows: Tensor | None = None) -> Tensor:
    """Find the rows of the table that addresses stand for.

    Args:
        address: int64, any shape that broadcasts to [..., B].
        lead: [S] of a memory that all datapoints share, or [B, S] of one per datapoint.
        rows: int64 [B, S], the row of each entry; None: entry a of datapoint b is in row b S + a.

    Returns:
        Rows of the shape of the address; for one memory per datapoint its last dimension is B.

    Raises:
        ValueError: addresses of another number of datapoints than memories.
    """
    if len(lead) == 1:
        return address
    batch, size = lead
    if address.dim() == 0 or address.shape[-1] not in (1, batch):
        raise ValueError(f"address: expected shape [..., {batch}], got {list(address.shape)}")
    place = torch.arange(batch, device=address.device) * size + address
    return place if rows is None else rows.flatten()[place]


def select(table: Any, rows: Tensor) -> Any:
    """Read the table at rows of any shape: [*rows.shape, *F]."""
    # index_select has a much faster backward pass on a CPU than advanced indexing.
    return map_tensors(lambda t: t.index_select(0, rows.flatten()).reshape(*rows.shape, *t.shape[1:]), table)


def mean(table: Any, weights: Tensor, lead: torch.Size, rows: Tensor | None = None) -> Any:
    """Average the entries under weights [..., B, S]: a soft read, [..., B, *F]; the rest as in `rows_at`."""

    def average(flat: Tensor) -> Tensor:
        flat = flat if flat.is_floating_point() else flat.to(weights.dtype)
        share = weights.to(flat.dtype)
        if len(lead) == 1:
            return torch.tensordot(share, flat, 1)
        each = flat if rows is None else flat.index_select(0, rows.flatten())
        found = torch.einsum("...bs,bsf->...bf", share, each.reshape(*lead, -1))
        return found.reshape(*share.shape[:-1], *flat.shape[1:])

    return map_tensors(average, table)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tensor or a nested (named) tuple."""
    if isinstance(tree, Tensor):
        return function(tree)
    mapped = [map_tensors(function, leaf) for leaf in tree]
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


def first_tensor(tree: Any) -> Tensor:
    """Return the first tensor of a nested structure."""
    return tree if isinstance(tree, Tensor) else first_tensor(next(iter(tree)))


def joined(parts: list[Any]) -> Any:
    """Concatenate structures of tensors, tensor by tensor."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    leaves = [joined(list(leaf)) for leaf in zip(*parts, strict=True)]
    return type(parts[0])(*leaves) if hasattr(parts[0], "_fields") else tuple(leaves)
