"""Computing once what several draws have in common: those that read the same entry for the same image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vma_pyro.memory.reading import map_tensors
from vma_pyro.networks.interface import Entry, Query


class Lookups(NamedTuple):
    """The different pairs of an image and an entry among the draws.

    Attributes:
        query, m: of each pair, [N, ...].
        place: of each draw, the number of its pair [*batch].
    """

    query: Query
    m: Entry
    place: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Give every draw what was found for its pair, [N, *F] to [*batch, *F]."""
        return values[self.place]


def lookups(query: Query, m: Entry) -> Lookups | None:
    """Find the pairs among draws [*batch] = [..., B].

    Returns:
        None where it is not known which entries are the same, or hardly any are.
    """
    images = len(query.key)
    if not m.rows or m.rows[0].dim() < 2:
        return None  # in training, or a single draw
    (rows,) = m.rows
    batch = torch.broadcast_shapes(rows.shape, (images,))
    image = torch.arange(images, device=rows.device).expand(batch)
    pairs, place = torch.unique(rows * images + image, return_inverse=True)
    if 4 * len(pairs) > 3 * place.numel():
        return None
    # Any draw of a pair stands for it.
    draw = torch.arange(place.numel(), device=rows.device)
    draw = torch.empty_like(pairs).scatter_(0, place.flatten(), draw)
    read = torch.arange(rows.numel(), device=rows.device).reshape(rows.shape).expand(batch).flatten()[draw]

    def of_images(values: Any) -> Any:
        return map_tensors(lambda t: t[image.flatten()[draw]], values)

    def of_reads(values: Any) -> Any:
        return map_tensors(lambda t: t.flatten(0, rows.dim() - 1)[read], values)

    return Lookups(of_images(query), of_reads(m), place)
