"""An index of a million entries: encoded once, addressed exactly, read in small parts.

Training sees tens of entries, a test thousands; here the keys of all entries are kept and compared with a query in
chunks, so that working memory does not grow with |M|. What follows happens in small memories of the entries that a
query has drawn or likes best, with plain `Model` and `Guide`.

(Over 250 lines, of one class: a good part of them says shapes, and what is refused.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vma_pyro._system.at_rest import at_rest
from vma_pyro._system.ranks import Ranks
from vma_pyro.memory.addresses import Addresses, best_of_both
from vma_pyro.memory.comparable import check_comparable
from vma_pyro.memory.fingerprint import fingerprint_of, kinds_of, sums_of
from vma_pyro.memory.keys import CHUNK, Keys
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model


class AddressIndex:
    """The address posterior of one model and guide, whose parameters no longer change, over very many entries.

    Made by `encode` or `load`. Several processes can hold it together, each a share of the entries; addresses
    count through all of them.

    Args:
        model, guide: the programs. Where their parameters are others than those that made the keys, every question
            is refused.
        kept: the keys that they made.
        ranks: the processes that hold the index together; None: this one alone.

    Raises:
        ValueError: keys that other parameters made; programs whose address cannot be looked up by keys.
    """

    def __init__(self, model: Model, guide: Guide, kept: Keys, ranks: Ranks | None = None) -> None:
        self.model, self.guide, self.kept = model, guide, kept
        self.ranks = ranks = ranks or Ranks()
        shares = [int(n) for n in ranks.gather(torch.tensor([len(kept.entries)]))]
        self.size, self._offset = sum(shares), sum(shares[: ranks.rank])
        self._most_chunks = math.ceil(max(shares) / CHUNK)
        self._seen: tuple[list[str], Tensor] | None = None  # of parameters whose fingerprint has been compared
        self._check_parameters()
        with at_rest(model, guide):
            check_comparable(model, guide, kept.entries)

    @classmethod
    def encode(
        cls,
        model: Model,
        guide: Guide,
        entries: Tensor,
        labels: Tensor | None = None,
        *,
        key_dtype: torch.dtype = torch.float32,
        chunk_size: int = 2048,
        shared_out: bool = False,
        show_progress: bool = False,
    ) -> AddressIndex:
        """Compute the keys of all entries, `chunk_size` at a time.

        Args:
            model: whose p(a | M) is used; its logits must depend on one entry each.
            guide: whose networks and similarity are used.
            entries: images [S, 1, 28, 28] that the model's likelihood takes; binary ones of any type, of which
                bytes need the least memory.
            labels: class of each entry [S].
            key_dtype: float32, or bfloat16: half the memory, three digits.
            chunk_size: entries in the networks at a time.
            shared_out: the entries are this process's share of a memory that all processes of `torch.distributed`
                hold together.
            show_progress: whether to draw a progress bar.

        Raises:
            ValueError: no entries, images of another shape or of values that the likelihood cannot score, labels
                of another shape, a similarity that cannot be computed in chunks, programs whose address cannot be
                looked up by keys.
        """
        ranks = Ranks.present() if shared_out else Ranks()
        options: Any = {"key_dtype": key_dtype, "chunk_size": chunk_size, "show_progress": show_progress}
        kept = Keys.encode(model, guide, entries, labels, ranks=ranks, **options)
        return cls(model, guide, kept, ranks)

    @classmethod
    def load(cls, path: Path, model: Model, guide: Guide, *, shared_out: bool = False) -> AddressIndex:
        """Read an index; the file is mapped, so that it opens at once and is read as needed.

        Args:
            path: of a file of `save`.
            model, guide: those that made it.
            shared_out: the file is this process's share.

        Raises:
            ValueError: damaged, no such index, or made by other parameters.
            FileNotFoundError: no such file.
        """
        return cls(model, guide, Keys.load(path), Ranks.present() if shared_out else Ranks())

    def save(self, path: Path) -> None:
        """Write entries and keys (of this process's share) to one file, as a whole or not at all.

        Raises:
            OSError: the folder cannot be written or the disk is full.
        """
        self.kept.save(path)

    @property
    def entries(self) -> Shaped[Tensor, "S C height width"]:
        """The entries (of this process's share)."""
        return self.kept.entries

    @property
    def labels(self) -> Int[Tensor, " S"] | None:
        """Class of each entry, or None."""
        return self.kept.labels

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Float[Tensor, "B S"]:
        """log q(a | x, M) of every entry (of this process's share), exactly.

        Args:
            x: images [B, 1, 28, 28].
        """
        logits = torch.empty(len(x), len(self.kept.entries))
        for chunk, part in enumerate(self._logits(x)):
            logits[:, chunk * CHUNK : (chunk + 1) * CHUNK] = part
        return logits.sub_(self._log_sum(logits.logsumexp(1)[:, None]))

    @torch.no_grad()
    def top(self, x: Tensor, k: int) -> Addresses:
        """The k most probable entries of each image, exactly, most probable first.

        Working memory does not depend on |M|.

        Args:
            x: images [B, 1, 28, 28].
            k: entries per image, at most |M|.

        Raises:
            ValueError: k outside 1 to |M|; other parameters than those that made the keys.
        """
        if not 1 <= k <= self.size:
            raise ValueError(f"k: expected 1 to {self.size}, the entries of the memory, got {k}")
        best = torch.full((len(x), k), -math.inf)
        where = torch.zeros(len(x), k, dtype=torch.long)
        total = torch.full((len(x),), -math.inf)
        for chunk, part in enumerate(self._logits(x)):
            total = torch.logaddexp(total, part.logsumexp(1))
            values, at = part.topk(min(k, part.shape[1]), dim=1)
            best, where = best_of_both(best, where, values, at + chunk * CHUNK + self._offset)
        values, addresses = (torch.cat(self.ranks.gather(mine), 1) for mine in (best, where))
        best, order = values.topk(k, dim=1)
        return Addresses(addresses.gather(1, order), best - self._log_sum(total[:, None]))

    @torch.no_grad()
    def sample(self, x: Tensor, num_samples: int) -> Addresses:
        """Addresses drawn from q(a | x, M), with replacement; working memory does not depend on |M|.

        First a chunk by its total probability, then an entry of that chunk.

        Args:
            x: images [B, 1, 28, 28].
            num_samples: addresses per image.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        mine = torch.full((len(x), self._most_chunks), -math.inf)
        for chunk, part in enumerate(self._logits(x)):
            mine[:, chunk] = part.logsumexp(1)
        totals = torch.cat(self.ranks.gather(mine), 1)  # [B, chunks of all processes]
        chosen = self.ranks.first(torch.multinomial(totals.softmax(1), num_samples, replacement=True))
        address, logit = torch.zeros_like(chosen), torch.zeros(chosen.shape)
        first = self.ranks.rank * self._most_chunks
        query, scale = self._query(x)
        for chunk in range(math.ceil(len(self.kept.entries) / CHUNK)):
            here = chosen == first + chunk
            if not bool(here.any()):
                continue
            logits = self._compare(query, scale, chunk)
            within = torch.multinomial(logits.softmax(1), num_samples, replacement=True)
            address[here] = (within + chunk * CHUNK + self._offset)[here]
            logit[here] = logits.gather(1, within)[here]
        # Each address was drawn by the process that holds it; the others have added nothing.
        log_prob = self.ranks.sum(logit) - totals.logsumexp(1, keepdim=True)
        return Addresses(self.ranks.sum(address), log_prob)

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Int[Tensor, " N"]:
        """Draw addresses from p(a | M), with replacement."""
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self._check_parameters()
        totals = torch.cat(self.ranks.gather(self.kept.prior.logsumexp(0)[None]))
        owner = self.ranks.first(torch.multinomial(totals.softmax(0), num_samples, replacement=True))
        # `torch.multinomial` stops at 2^24 categories.
        cumulative = (self.kept.prior - self.kept.prior.max()).double().exp().cumsum(0)
        at = torch.searchsorted(cumulative, torch.rand(num_samples, dtype=torch.float64) * cumulative[-1])
        address = at.clamp(max=len(self.kept.prior) - 1) + self._offset
        return self.ranks.sum(torch.where(owner == self.ranks.rank, address, 0))

    def part(self, address: Int[Tensor, "B k"]) -> Memory:
        """The entries at these addresses as a memory of its own for each image, [B, k, 1, 28, 28]."""
        used, rows = address.unique(return_inverse=True)
        here, held = self._here(used)
        entries = self.ranks.sum(self.kept.entries[here] * held[:, None, None, None])
        labels = None if self.kept.labels is None else self.ranks.sum(self.kept.labels[here] * held)[rows]
        return SelectedMemory(Memory(entries.float()), rows, labels)

    def log_prior(self, address: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """log p(a | M) among all entries."""
        self._check_parameters()
        here, held = self._here(address)
        logits = self.ranks.sum(torch.where(held, self.kept.prior[here], 0.0))
        return logits - self._log_sum(self.kept.prior.logsumexp(0)[None])

    def _here(self, address: Tensor) -> tuple[Tensor, Tensor]:
        """Find addresses among this process's entries (0 where it has another one's), and tell which it has."""
        here = address - self._offset
        held = (here >= 0) & (here < len(self.kept.entries))
        return torch.where(held, here, 0), held

    def _logits(self, x: Tensor) -> Iterator[Float[Tensor, "B chunk"]]:
        """Unnormalised log q(a | x, M) of this process's entries, chunk after chunk."""
        query, scale = self._query(x)
        for chunk in range(math.ceil(len(self.kept.entries) / CHUNK)):
            yield self._compare(query, scale, chunk)

    def _query(self, x: Tensor) -> tuple[Float[Tensor, "B E"], Tensor]:
        """The embedded queries, and the factor on the inner products."""
        self._check_parameters()
        similarity: Any = self.guide.similarity
        with at_rest(self.guide):
            query = self.guide.networks.query(x).key
            embedded = similarity.embed(query, self.kept.centre.to(query.device))
        return embedded.cpu().float(), similarity.log_scale.exp().cpu().float()  # in 32 bits, like the prior

    def _compare(self, query: Tensor, scale: Tensor, chunk: int) -> Float[Tensor, "B chunk"]:
        # In float32 whatever the keys: products rounded to bfloat16 would tie entries.
        return scale * (query @ self.kept.keys[chunk * CHUNK : (chunk + 1) * CHUNK].float().T)

    def _log_sum(self, mine: Float[Tensor, "B one"]) -> Float[Tensor, "B one"]:
        """Add what the processes hold up, given the logarithms of their sums."""
        return torch.stack(self.ranks.gather(mine)).logsumexp(0)

    def _check_parameters(self) -> None:
        # A fingerprint costs as much as a query: those seen before are known by what is cheap to see of them.
        kinds, sums = kinds_of(self.model, self.guide), sums_of(self.model, self.guide)
        if self._seen is not None and self._seen[0] == kinds and torch.equal(self._seen[1], sums):
            return
        if fingerprint_of(self.model, self.guide) != self.kept.fingerprint:
            raise ValueError("guide: expected the parameters that made the keys, got others; encode again")
        self._seen = (kinds, sums)
