"""An index of millions of entries: encoded once, addressed exactly or by inverted lists, read in small parts.

Training sees tens of entries, a test thousands; here the keys of all entries are kept and compared with a query in
chunks, so that working memory does not grow with |M|. What follows happens in small memories of the entries that a
query has drawn or likes best, with plain `Model` and `Guide`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vma_pyro._system.at_rest import at_rest
from vma_pyro._system.ranks import Ranks
from vma_pyro._system.whole import check_whole
from vma_pyro.memory.addresses import Addresses
from vma_pyro.memory.approximate import ListSearch
from vma_pyro.memory.comparable import check_comparable
from vma_pyro.memory.exact import ExactSearch
from vma_pyro.memory.fingerprint import fingerprint_of, kinds_of, sums_of
from vma_pyro.memory.keys import Keys
from vma_pyro.memory.lists import InvertedLists
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model

LOOKED_AT, MOST_VALUES = 1024, 2**20  # entries, and values of them, that a query's images are compared with


class AddressIndex:
    """The address posterior of one model and guide, whose parameters no longer change, over very many entries.

    Made by `encode` or `load`. Several processes can hold it together, each a share of the entries; addresses
    count through all of them.

    Without `search` every key is compared with a query, and q(a | x, M) is exact. With `InvertedLists` only those
    in a few lists are, and q is a guide of its own, renormalised within the entries found (its support). Every
    bound remains a lower bound of log p(x | M) among all entries: a guide with less support can only leave
    something out. Exact are then

    - the probabilities of q within its support: of the keys in `key_dtype`; with `key_dtype=None` of the keys as
      the lists hold them, in half precision or as their codes decode;
    - p(a | M) of every entry.

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
        support = 0 if kept.lists is None else kept.lists.support
        shares, supports = torch.stack(ranks.gather(torch.tensor([len(kept.entries), support]))).T.tolist()
        if len(set(supports)) > 1:
            raise ValueError(f"kept: expected one search in all processes, got supports {supports} (0: exact)")
        self.size, self._offset = sum(shares), sum(shares[: ranks.rank])
        self._search: ExactSearch | ListSearch
        if kept.lists is not None:
            if (held := int(kept.lists.found.ntotal)) != len(kept.entries):
                raise ValueError(f"kept: expected lists of its {len(kept.entries)} entries, got {held}")
            self._search = ListSearch(kept.lists, kept.keys, shares, ranks)
        elif kept.keys is not None:
            self._search = ExactSearch(kept.keys, shares, ranks)
        else:
            raise ValueError("kept: expected keys or lists of them, got neither")
        # The same entries in all processes, so that all refuse the same images.
        number = max(1, min(min(shares), LOOKED_AT, MOST_VALUES // max(1, kept.entries[0].numel())))
        self._few = ranks.first(kept.entries[:number].float())
        self._prior_sum: Tensor | None = None  # of all entries: costs more than the query itself
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
        key_dtype: torch.dtype | None = torch.float32,
        search: InvertedLists | None = None,
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
            key_dtype: float32, or bfloat16: half the memory, three digits; None, with `search` alone: keys are
                kept in the lists alone, and probabilities are those of the keys in there.
            search: how candidates are found, see `InvertedLists` (needs the extra `index`); None: by comparing a
                query with every key.
            chunk_size: entries in the networks at a time.
            shared_out: the entries are this process's share of a memory that all processes of `torch.distributed`
                hold together.
            show_progress: whether to draw a progress bar.

        Raises:
            ValueError: no entries, images of another shape or of values that the likelihood cannot score, labels
                of another shape, a similarity that cannot be computed in chunks, programs whose address cannot be
                looked up by keys; a search without faiss, or with numbers that do not fit the entries.
        """
        ranks = Ranks.present() if shared_out else Ranks()
        options: Any = {"key_dtype": key_dtype, "search": search, "chunk_size": chunk_size}
        kept = Keys.encode(model, guide, entries, labels, ranks=ranks, show_progress=show_progress, **options)
        return cls(model, guide, kept, ranks)

    @classmethod
    def load(cls, path: Path, model: Model, guide: Guide, *, shared_out: bool = False) -> AddressIndex:
        """Read an index; the file is mapped, so that it opens at once and is read as needed (lists at once).

        Args:
            path: of a file of `save`.
            model, guide: those that made it.
            shared_out: the file is this process's share.

        Raises:
            ValueError: damaged, no such index, made by other parameters, or with inverted lists without faiss.
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

        Raises:
            ValueError: an index with inverted lists, which knows q within its support alone; images that do not
                look like the entries, see `Memory.check`.
        """
        return self._search.posterior(*self._query(x))

    @torch.no_grad()
    def top(self, x: Tensor, k: int) -> Addresses:
        """The k most probable entries of each image, most probable first; exactly, without inverted lists.

        Working memory does not depend on |M|.

        Args:
            x: images [B, 1, 28, 28].
            k: entries per image, at most |M|, or the support of the inverted lists.

        Raises:
            ValueError: k outside of that; other parameters than those that made the keys; images that do not look
                like the entries, see `Memory.check`.
        """
        check_whole("k", k, least=0)
        if not 1 <= k <= self._search.support:
            raise ValueError(f"k: expected 1 to {self._search.support}, {self._search.whose}, got {k}")
        return self._search.top(*self._query(x), k)

    @torch.no_grad()
    def sample(self, x: Tensor, num_samples: int) -> Addresses:
        """Addresses drawn from q(a | x, M), with replacement; working memory does not depend on |M|.

        Args:
            x: images [B, 1, 28, 28].
            num_samples: addresses per image.

        Raises:
            ValueError: no samples; images that do not look like the entries, see `Memory.check`.
        """
        check_whole("num_samples", num_samples)
        return self._search.sample(*self._query(x), num_samples)

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Int[Tensor, " N"]:
        """Draw addresses from p(a | M), with replacement."""
        check_whole("num_samples", num_samples)
        self._check_parameters()
        totals = torch.cat(self.ranks.gather(self.kept.prior.logsumexp(0)[None]))
        owner = self.ranks.first(torch.multinomial(totals.softmax(0), num_samples, replacement=True))
        # `torch.multinomial` stops at 2^24 categories.
        cumulative = (self.kept.prior - self.kept.prior.max()).double().exp().cumsum(0)
        at = torch.searchsorted(cumulative, torch.rand(num_samples, dtype=torch.float64) * cumulative[-1])
        address = at.clamp(max=len(self.kept.prior) - 1) + self._offset
        return self.ranks.sum(torch.where(owner == self.ranks.rank, address, 0))

    def part(self, address: Int[Tensor, "B k"]) -> Memory:
        """The entries at these addresses as a memory of its own for each image, [B, k, 1, 28, 28].

        Raises:
            ValueError: addresses outside of the memory, or not int64.
        """
        used, rows = address.unique(return_inverse=True)
        here, held = self._here(used)
        entries = self.ranks.sum(self.kept.entries[here] * held[:, None, None, None])
        labels = None if self.kept.labels is None else self.ranks.sum(self.kept.labels[here] * held)[rows]
        return SelectedMemory(Memory(entries.float()), rows, labels)

    def log_prior(self, address: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """log p(a | M) among all entries.

        Raises:
            ValueError: addresses outside of the memory, or not int64.
        """
        self._check_parameters()
        here, held = self._here(address)
        logits = self.ranks.sum(torch.where(held, self.kept.prior[here], 0.0))
        if self._prior_sum is None:
            self._prior_sum = self.ranks.log_sum(self.kept.prior.logsumexp(0)[None])
        return logits - self._prior_sum

    def _here(self, address: Tensor) -> tuple[Tensor, Tensor]:
        """Find addresses among this process's entries (0 where it has another one's), and tell which it has."""
        if address.dtype != torch.long:
            raise ValueError(f"address: expected int64, got {address.dtype}")
        if address.numel() and not (int(address.min()) >= 0 and int(address.max()) < self.size):
            low, high = int(address.min()), int(address.max())
            raise ValueError(f"address: expected 0 to {self.size - 1}, those of the memory, got {low} to {high}")
        here = address - self._offset
        held = (here >= 0) & (here < len(self.kept.entries))
        return torch.where(held, here, 0), held

    def _query(self, x: Tensor) -> tuple[Float[Tensor, "B E"], Tensor]:
        """The embedded queries, and the factor on the inner products."""
        self._check_parameters()
        Memory(self._few).check(x)  # a new one at each query: a memory compares values once
        similarity: Any = self.guide.similarity
        with at_rest(self.guide):
            query = self.guide.networks.query(x).key
            embedded = similarity.embed(query, self.kept.centre.to(query.device))
        return embedded.cpu().float(), similarity.log_scale.exp().cpu().float()  # in 32 bits, like the prior

    def _check_parameters(self) -> None:
        # A fingerprint costs as much as a query: those seen before are known by what is cheap to see of them.
        kinds, sums = kinds_of(self.model, self.guide), sums_of(self.model, self.guide)
        if self._seen is not None and self._seen[0] == kinds and torch.equal(self._seen[1], sums):
            return
        if fingerprint_of(self.model, self.guide) != self.kept.fingerprint:
            raise ValueError("guide: expected the parameters that made the keys, got others; encode again")
        self._seen = (kinds, sums)
