"""Approximate addressing: the best of some candidates are the support of q(a | x, M)."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro._system.ranks import Ranks
from vma_pyro.memory.addresses import Addresses
from vma_pyro.memory.lists import Lists

NUMBERS_PER_CHUNK = 2**23  # of keys compared once more at a time: 32 MB


class ListSearch:
    r"""A guide of its own: q(a | x, M), renormalised within the P entries A(x) that its lists find.

    .. math:: q(a \mid x, M) = \frac{[a \in A(x)] \, e^{s(x, m_a)}}{\sum_{b \in A(x)} e^{s(x, m_b)}}

    What it leaves out can only lower a bound: for any A, by Jensen's inequality,

    .. math:: \mathbb{E}_{q} \log \frac{p(a \mid M) \, p(x \mid m_a)}{q(a \mid x, M)}
              \le \log \sum_{a \in A(x)} p(a \mid M) \, p(x \mid m_a) \le \log p(x \mid M).

    Args:
        lists: of this process's keys.
        keys: the same keys as `AddressIndex.encode` keeps them [S, E], of which the logits s are inner products;
            None: they are those of the keys as the lists hold them.
        shares: entries of each process.
        ranks: the processes.
    """

    def __init__(self, lists: Lists, keys: Float[Tensor, "S E"] | None, shares: list[int], ranks: Ranks) -> None:
        self.lists, self.keys, self.ranks = lists, keys, ranks
        self.support, self.offset = min(sum(shares), lists.support), sum(shares[: ranks.rank])
        self.whose = "the support of the search"

    def posterior(self, query: Float[Tensor, "B E"], scale: Tensor) -> NoReturn:
        """Refuse: the entries outside the support have been compared with nothing."""
        raise ValueError(
            "search: expected None, which compares every key, for the posterior of every entry, got "
            "InvertedLists, for which there are `top` and `sample`"
        )

    def top(self, query: Float[Tensor, "B E"], scale: Tensor, k: int) -> Addresses:
        """The k most probable entries of the support, most probable first."""
        found = self._found(query, scale)
        return Addresses(found.address[:, :k], found.log_prob[:, :k])

    def sample(self, query: Float[Tensor, "B E"], scale: Tensor, num_samples: int) -> Addresses:
        """Draw from the support, with replacement."""
        found = self._found(query, scale)
        chosen = self.ranks.first(torch.multinomial(found.log_prob.exp(), num_samples, replacement=True))
        return Addresses(found.address.gather(1, chosen), found.log_prob.gather(1, chosen))

    def _found(self, query: Tensor, scale: Tensor) -> Addresses:
        """Find the whole support, the best of what all processes find, most probable first."""
        nprobe = self.lists.nprobe
        best, address = self._best(query, scale, nprobe)
        # An entry that is not there must not be counted as one: look further until there are enough.
        while bool((few := (best == -math.inf).any(1)).any()):
            if nprobe >= int(self.lists.found.nlist):
                raise ValueError("guide: expected a similarity with finite logits, got infinite ones")
            nprobe *= 2
            best[few], address[few] = self._best(query[few], scale, nprobe)
        return Addresses(address, best.log_softmax(1))

    def _best(self, query: Tensor, scale: Tensor, nprobe: int) -> tuple[Float[Tensor, "B P"], Int[Tensor, "B P"]]:
        """Logits and addresses of the best entries in these lists of all processes; -inf where there are fewer."""
        score, row = self.lists.search(query, nprobe)
        logit = scale * (score if self.keys is None else self._compared(query, row.clamp(min=0), self.keys))
        mine = logit.masked_fill(row < 0, -math.inf)
        missing = self.support - mine.shape[1]  # where this process has fewer entries than that
        values, addresses = (
            torch.cat(self.ranks.gather(each), 1)
            for each in (F.pad(mine, (0, missing), value=-math.inf), F.pad(row + self.offset, (0, missing)))
        )
        best, order = values.topk(self.support, dim=1)
        return best, addresses.gather(1, order)

    def _compared(
        self, query: Float[Tensor, "B E"], row: Int[Tensor, "B P"], keys: Float[Tensor, "S E"]
    ) -> Float[Tensor, "B P"]:
        """Inner products with the keys themselves, in float32."""
        step = max(1, NUMBERS_PER_CHUNK // (row.shape[1] * keys.shape[1]))
        parts = zip(query.split(step), row.split(step), strict=True)
        return torch.cat([torch.einsum("be,bpe->bp", q, keys[at].float()) for q, at in parts])
