"""The keys most similar to each query, among very many: a search that reads every key once."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 4096  # keys compared at a time: what comes of them stays in the cache of the processor
BLOCK = 16  # keys of which only the best similarity is kept at first


@torch.no_grad()
def nearest(
    query: Float[Tensor, "B E"],
    keys: Float[Tensor, "S E"],
    number: int,
    *,
    left_out: Int[Tensor, " B"] | None = None,
) -> Int[Tensor, "B number"]:
    """The keys with the largest inner products, best first.

    The best n keys lie in the n blocks whose best keys are best: only those are ordered. (`topk` of all inner
    products takes longer than the products.)

    Args:
        query: as the similarity compares them.
        keys: likewise; in float32 the search is exact. Of bfloat16 the products are rounded to three digits, and
            those in the best 2 n blocks compared again in 32 bits: what is missed is as good as what is found.
        number: n, for each query, at most S (S - 1 with one left out).
        left_out: one key for each query that is not to be found.

    Raises:
        ValueError: more than there are.
    """
    size = len(keys)
    most = size - (left_out is not None)
    if not 1 <= number <= most:
        raise ValueError(f"number: expected 1 to {most}, as many as there are, got {number}")
    with torch.autocast(keys.device.type, enabled=False):
        return _nearest(query, keys, number, left_out)


def _nearest(query: Tensor, keys: Tensor, number: int, left_out: Tensor | None) -> Int[Tensor, "B number"]:
    size, wanted = len(keys), number + (left_out is not None)
    # Products rounded to bfloat16 tie: with twice as many blocks the best are among them.
    blocks = min(-(-size // BLOCK), wanted if keys.dtype == torch.float32 else 2 * wanted)
    best = _best_of_blocks(query.to(keys.dtype), keys).topk(blocks, dim=0).indices.T  # [B, blocks]
    members = (best.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=keys.device)).flatten(1)
    inside = members < size
    members = members.clamp_(max=size - 1)
    products = torch.bmm(keys[members].float(), query.float().unsqueeze(-1)).squeeze(-1)  # [B, blocks * BLOCK]
    products.masked_fill_(~inside, -math.inf)
    if left_out is not None:
        products.masked_fill_(members == left_out.unsqueeze(1), -math.inf)
    return members.gather(1, products.topk(number, dim=1).indices)


def _best_of_blocks(query: Tensor, keys: Tensor) -> Float[Tensor, "blocks B"]:
    """The largest inner product in each block of keys with each query."""
    best = []
    for part in keys.split(CHUNK):
        products = part @ query.T
        products = products.float()  # the largest of bfloat16 takes four times as long
        short = -len(part) % BLOCK
        if short:
            products = torch.cat([products, products.new_full((short, len(query)), -math.inf)])
        best.append(products.reshape(-1, BLOCK, len(query)).amax(1))
    return torch.cat(best)
