"""Exact addressing: a query compared with every key, chunk after chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.ranks import Ranks
from vma_pyro.memory.addresses import Addresses, best_of_both

CHUNK = 16384  # entries compared at a time: 8 MB of keys


class ExactSearch:
    """q(a | x, M) of all entries.

    Args:
        keys: of this process's entries [S, E].
        shares: entries of each process.
        ranks: the processes.
    """

    def __init__(self, keys: Float[Tensor, "S E"], shares: list[int], ranks: Ranks) -> None:
        self.keys, self.ranks = keys, ranks
        self.support, self.offset = sum(shares), sum(shares[: ranks.rank])
        self.whose = "the entries of the memory"
        self._most_chunks = math.ceil(max(shares) / CHUNK)
        self._chunks = math.ceil(len(keys) / CHUNK)

    def posterior(self, query: Float[Tensor, "B E"], scale: Tensor) -> Float[Tensor, "B S"]:
        """log q(a | x, M) of every entry of this process."""
        logits = query.new_empty(len(query), len(self.keys))
        for chunk, part in enumerate(self._logits(query, scale)):
            logits[:, chunk * CHUNK : (chunk + 1) * CHUNK] = part
        return logits.sub_(self.ranks.log_sum(logits.logsumexp(1)[:, None]))

    def top(self, query: Float[Tensor, "B E"], scale: Tensor, k: int) -> Addresses:
        """The k most probable entries, most probable first."""
        best = query.new_full((len(query), k), -math.inf)
        where = torch.zeros(len(query), k, dtype=torch.long)
        total = query.new_full((len(query),), -math.inf)
        for chunk, part in enumerate(self._logits(query, scale)):
            total = torch.logaddexp(total, part.logsumexp(1))
            values, at = part.topk(min(k, part.shape[1]), dim=1)
            best, where = best_of_both(best, where, values, at + chunk * CHUNK + self.offset)
        values, addresses = (torch.cat(self.ranks.gather(mine), 1) for mine in (best, where))
        best, order = values.topk(k, dim=1)
        return Addresses(addresses.gather(1, order), best - self.ranks.log_sum(total[:, None]))

    def sample(self, query: Float[Tensor, "B E"], scale: Tensor, num_samples: int) -> Addresses:
        """Draw with replacement: first a chunk by its total probability, then an entry of that chunk."""
        mine = query.new_full((len(query), self._most_chunks), -math.inf)
        for chunk, part in enumerate(self._logits(query, scale)):
            mine[:, chunk] = part.logsumexp(1)
        totals = torch.cat(self.ranks.gather(mine), 1)  # [B, chunks of all processes]
        chosen = self.ranks.first(torch.multinomial(totals.softmax(1), num_samples, replacement=True))
        address, logit = torch.zeros_like(chosen), query.new_zeros(chosen.shape)
        first = self.ranks.rank * self._most_chunks
        for chunk in range(self._chunks):
            here = chosen == first + chunk
            if not bool(here.any()):
                continue
            logits = self._compare(query, scale, chunk)
            within = torch.multinomial(logits.softmax(1), num_samples, replacement=True)
            address[here] = (within + chunk * CHUNK + self.offset)[here]
            logit[here] = logits.gather(1, within)[here]
        # Each address was drawn by the process that holds it; the others have added nothing.
        log_prob = self.ranks.sum(logit) - totals.logsumexp(1, keepdim=True)
        return Addresses(self.ranks.sum(address), log_prob)

    def _logits(self, query: Tensor, scale: Tensor) -> Iterator[Float[Tensor, "B chunk"]]:
        """Unnormalised log q(a | x, M) of this process's entries, chunk after chunk."""
        for chunk in range(self._chunks):
            yield self._compare(query, scale, chunk)

    def _compare(self, query: Tensor, scale: Tensor, chunk: int) -> Float[Tensor, "B chunk"]:
        # In float32 whatever the keys: products rounded to bfloat16 would tie entries.
        return scale * (query @ self.keys[chunk * CHUNK : (chunk + 1) * CHUNK].float().T)
