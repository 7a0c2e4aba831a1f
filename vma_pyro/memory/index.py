"""Memories of a million entries: encoded once, addressed exactly, read in small parts.

Training sees tens of entries, a test thousands; here the keys of all entries are kept and compared with a query in
chunks, so that working memory does not grow with |M|. What follows happens in small memories of the entries that a
query has drawn or likes best, with plain `Model` and `Guide`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from vma_pyro._system import checkpoint
from vma_pyro._system.ranks import Ranks
from vma_pyro.memory.checks import check_binary
from vma_pyro.memory.fingerprint import fingerprint_of, sums_of
from vma_pyro.memory.memory import Memory

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model

CHUNK = 16384  # entries compared at a time: 8 MB of keys


class Addresses(NamedTuple):
    """Some addresses for each query.

    Attributes:
        address: entries [B, k].
        log_prob: log q(a | x, M) among all entries [B, k].
    """

    address: Int[Tensor, "B k"]
    log_prob: Float[Tensor, "B k"]


class LargeMemory:
    """M with a key kept for every entry, for one model and guide whose parameters no longer change.

    Made by `encode` or `load`. Several processes can hold it together, each a share of the entries; addresses
    count through all of them.

    Args:
        entries: binary images [S, 1, 28, 28], one byte per pixel.
        labels: class of each entry [S], or None.
        keys: what the guide's similarity compares with a query, [S, E], float32 or bfloat16.
        centre: mean key of the entries [E], before the similarity embeds it.
        prior: logits of p(a | M) [S].
        fingerprint: of the parameters that made all this; others are refused.
        ranks: the processes that hold the memory together; None: this one alone.
    """

    def __init__(
        self,
        entries: UInt8[Tensor, "S C height width"],
        labels: Int[Tensor, " S"] | None,
        keys: Float[Tensor, "S E"],
        centre: Float[Tensor, " E"],
        prior: Float[Tensor, " S"],
        fingerprint: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.entries, self.labels, self.keys = entries, labels, keys
        self.centre, self.prior, self.fingerprint = centre, prior, fingerprint
        self.ranks = ranks = ranks or Ranks()
        shares = [int(n) for n in ranks.gather(torch.tensor([len(entries)]))]
        self.size, self._offset = sum(shares), sum(shares[: ranks.rank])
        self._most_chunks = math.ceil(max(shares) / CHUNK)
        self._seen: Tensor | None = None  # sums of parameters whose fingerprint has been compared

    @classmethod
    @torch.no_grad()
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
    ) -> LargeMemory:
        """Compute the keys of all entries, `chunk_size` at a time.

        Args:
            model: whose p(a | M) is used; its logits must depend on one entry each.
            guide: whose networks and similarity are used.
            entries: binary images [S, 1, 28, 28] of any type; bytes need the least memory.
            labels: class of each entry [S].
            key_dtype: float32, or bfloat16: half the memory, three digits.
            chunk_size: entries in the networks at a time.
            shared_out: the entries are this process's share of a memory that all processes of `torch.distributed`
                hold together.
            show_progress: whether to draw a progress bar.

        Raises:
            ValueError: no entries, images of another shape, values other than 0 and 1, labels of another shape, a
                similarity that cannot be computed in chunks.
        """
        _check(guide, entries, labels, key_dtype)
        networks = guide.networks
        similarity: Any = copy.deepcopy(guide.similarity).cpu()
        device = next(iter(networks.parameters())).device
        raw = torch.empty(len(entries), networks.key_dim, dtype=torch.float32)
        prior = torch.empty(len(entries), dtype=torch.float32)
        total = torch.zeros(networks.key_dim + 1, dtype=torch.float64)  # of keys, and their number
        starts = range(0, len(entries), chunk_size)
        for start in tqdm(starts, desc="encoding", unit="chunk", disable=not show_progress):
            part = slice(start, start + chunk_size)
            check_binary("entries", entries[part])
            memory = Memory(entries[part].to(device))
            encoded = memory.encode(networks)
            raw[part] = encoded.features.key.cpu()
            tied = model.networks is networks
            prior[part] = model.address_prior(encoded if tied else memory.encode(model.networks)).cpu()
            total[:-1] += raw[part].double().sum(0)  # on the CPU
            total[-1] += len(raw[part])
        ranks = Ranks.present() if shared_out else Ranks()
        total = ranks.sum(total)
        centre = (total[:-1] / total[-1]).float()
        keys = raw if key_dtype == raw.dtype else torch.empty(raw.shape, dtype=key_dtype)
        for start in range(0, len(entries), CHUNK):
            part = slice(start, start + CHUNK)
            keys[part] = similarity.embed(raw[part], centre)
        return cls(entries.to(torch.uint8).cpu(), labels, keys, centre, prior, fingerprint_of(model, guide), ranks)

    @torch.no_grad()
    def posterior(self, model: Model, guide: Guide, x: Tensor) -> Float[Tensor, "B S"]:
        """log q(a | x, M) of every entry (of this process's share), exactly.

        Args:
            model, guide: those that made the keys.
            x: images [B, 1, 28, 28].
        """
        logits = torch.empty(len(x), len(self.entries))
        for chunk, part in enumerate(self._logits(model, guide, x)):
            logits[:, chunk * CHUNK : (chunk + 1) * CHUNK] = part
        return logits.sub_(self._log_sum(logits.logsumexp(1)[:, None]))

    @torch.no_grad()
    def top(self, model: Model, guide: Guide, x: Tensor, k: int) -> Addresses:
        """The k most probable entries of each image, exactly, most probable first.

        Working memory does not depend on |M|.

        Args:
            model, guide: those that made the keys.
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
        for chunk, part in enumerate(self._logits(model, guide, x)):
            total = torch.logaddexp(total, part.logsumexp(1))
            values, at = part.topk(min(k, part.shape[1]), dim=1)
            best, where = _best(best, where, values, at + chunk * CHUNK + self._offset)
        values, addresses = (torch.cat(self.ranks.gather(mine), 1) for mine in (best, where))
        best, order = values.topk(k, dim=1)
        return Addresses(addresses.gather(1, order), best - self._log_sum(total[:, None]))

    @torch.no_grad()
    def sample(self, model: Model, guide: Guide, x: Tensor, num_samples: int) -> Addresses:
        """Addresses drawn from q(a | x, M), with replacement; working memory does not depend on |M|.

        First a chunk by its total probability, then an entry of that chunk.

        Args:
            model, guide: those that made the keys.
            x: images [B, 1, 28, 28].
            num_samples: addresses per image.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        mine = torch.full((len(x), self._most_chunks), -math.inf)
        for chunk, part in enumerate(self._logits(model, guide, x)):
            mine[:, chunk] = part.logsumexp(1)
        totals = torch.cat(self.ranks.gather(mine), 1)  # [B, chunks of all processes]
        chosen = self.ranks.first(torch.multinomial(totals.softmax(1), num_samples, replacement=True))
        address, logit = torch.zeros_like(chosen), torch.zeros(chosen.shape)
        first = self.ranks.rank * self._most_chunks
        query, scale = self._query(model, guide, x)
        for chunk in range(math.ceil(len(self.entries) / CHUNK)):
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
        """Addresses drawn from p(a | M), with replacement."""
        totals = torch.cat(self.ranks.gather(self.prior.logsumexp(0)[None]))
        owner = self.ranks.first(torch.multinomial(totals.softmax(0), num_samples, replacement=True))
        # `torch.multinomial` stops at 2^24 categories.
        cumulative = (self.prior - self.prior.max()).double().exp().cumsum(0)
        at = torch.searchsorted(cumulative, torch.rand(num_samples, dtype=torch.float64) * cumulative[-1])
        address = at.clamp(max=len(self.prior) - 1) + self._offset
        return self.ranks.sum(torch.where(owner == self.ranks.rank, address, 0))

    def part(self, address: Int[Tensor, "B k"]) -> Memory:
        """The entries at these addresses as a memory of its own for each image, [B, k, 1, 28, 28]."""
        here = address - self._offset
        held = (here >= 0) & (here < len(self.entries))
        here = torch.where(held, here, 0)
        entries = self.ranks.sum(self.entries[here] * held[..., None, None, None])
        labels = None if self.labels is None else self.ranks.sum(self.labels[here] * held)
        return Memory(entries.float(), labels)

    def log_prior(self, address: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """log p(a | M) among all entries."""
        here = address - self._offset
        held = (here >= 0) & (here < len(self.entries))
        logits = self.ranks.sum(torch.where(held, self.prior[torch.where(held, here, 0)], 0.0))
        return logits - self._log_sum(self.prior.logsumexp(0)[None])

    def save(self, path: Path) -> None:
        """Write entries and keys (of this process's share) to one file, as a whole or not at all.

        Raises:
            OSError: the folder cannot be written or the disk is full.
        """
        content = {name: getattr(self, name) for name in FIELDS}
        for name, value in content.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                content[name] = value.clone()  # a slice would bring what it was cut from
        checkpoint.save(path, {"large_memory": content})

    @classmethod
    def load(cls, path: Path, *, shared_out: bool = False) -> LargeMemory:
        """Read a memory with its keys; the file is mapped, so that it opens at once and is read as needed.

        Args:
            path: of the file.
            shared_out: the file is this process's share.

        Raises:
            ValueError: damaged, or no such memory.
            FileNotFoundError: no such file.
        """
        content = checkpoint.load(path, mmap=True).get("large_memory")
        if content is None:
            raise ValueError(f"checkpoint {path}: expected a large memory, got another kind of checkpoint")
        parts = {name: content[name] for name in FIELDS}
        return cls(**parts, ranks=Ranks.present() if shared_out else Ranks())

    def _logits(self, model: Model, guide: Guide, x: Tensor) -> Iterator[Float[Tensor, "B chunk"]]:
        """Unnormalised log q(a | x, M) of this process's entries, chunk after chunk."""
        query, scale = self._query(model, guide, x)
        for chunk in range(math.ceil(len(self.entries) / CHUNK)):
            yield self._compare(query, scale, chunk)

    def _query(self, model: Model, guide: Guide, x: Tensor) -> tuple[Float[Tensor, "B E"], Tensor]:
        """The embedded queries, and the factor on the inner products."""
        self._check_parameters(model, guide)
        similarity: Any = guide.similarity
        query = guide.networks.query(x).key
        embedded = similarity.embed(query, self.centre.to(query.device))
        return embedded.cpu().float(), similarity.log_scale.exp().cpu().float()  # in 32 bits, like the prior

    def _compare(self, query: Tensor, scale: Tensor, chunk: int) -> Float[Tensor, "B chunk"]:
        # In float32 whatever the keys: products rounded to bfloat16 would tie entries.
        return scale * (query @ self.keys[chunk * CHUNK : (chunk + 1) * CHUNK].float().T)

    def _log_sum(self, mine: Float[Tensor, "B one"]) -> Float[Tensor, "B one"]:
        """Of the processes' logarithms of sums."""
        return torch.stack(self.ranks.gather(mine)).logsumexp(0)

    def _check_parameters(self, model: Model, guide: Guide) -> None:
        now = sums_of(model, guide)
        if self._seen is not None and torch.equal(now, self._seen):  # a fingerprint costs as much as a query
            return
        if fingerprint_of(model, guide) != self.fingerprint:
            raise ValueError("guide: expected the parameters that made the keys, got others; encode again")
        self._seen = now


FIELDS = ("entries", "labels", "keys", "centre", "prior", "fingerprint")


def _best(
    best: Float[Tensor, "B k"], where: Int[Tensor, "B k"], values: Float[Tensor, "B n"], at: Int[Tensor, "B n"]
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """The k best of both."""
    kept, order = torch.cat([best, values], 1).topk(best.shape[1], dim=1)
    return kept, torch.cat([where, at], 1).gather(1, order)


def _check(guide: Guide, entries: Tensor, labels: Tensor | None, key_dtype: torch.dtype) -> None:
    if isinstance(entries, Memory):
        raise ValueError(
            "entries: expected a tensor of images [S, ...], got a Memory; give `memory.entries[memory.mask]`, "
            "or `memory.entries` if all are entries"
        )
    expected = guide.networks.image_shape
    if entries.dim() != 4 or tuple(entries.shape[1:]) != expected or len(entries) == 0:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"entries: expected shape [S, {shape}] with S >= 1, got {list(entries.shape)}")
    if labels is not None and labels.shape != entries.shape[:1]:
        raise ValueError(f"labels: expected shape [{len(entries)}], got {list(labels.shape)}")
    if key_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"key_dtype: expected torch.float32 or torch.bfloat16, got {key_dtype}")
    for part in ("embed", "log_scale"):
        if not hasattr(guide.similarity, part):
            raise ValueError(
                f"guide.similarity: expected `embed` and `log_scale`, so that keys are compared in chunks, got "
                f"{type(guide.similarity).__name__} without `{part}`"
            )
