"""The keys of very many entries, computed once and kept in a file with the entries."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from vma_pyro._system import checkpoint
from vma_pyro._system.at_rest import at_rest
from vma_pyro._system.copied import copied
from vma_pyro._system.ranks import Ranks
from vma_pyro._system.whole import check_whole
from vma_pyro.memory.checks import check_labels
from vma_pyro.memory.fingerprint import fingerprint_of
from vma_pyro.memory.lists import InvertedLists, Lists, faiss_of
from vma_pyro.memory.memory import Memory

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model

CHUNK = 16384  # keys embedded at a time: 8 MB


@dataclass(frozen=True, eq=False)
class Keys:
    """What one model and guide make of very many entries, or of a process's share of them.

    Args:
        entries: images [S, 1, 28, 28]; binary ones with a byte per pixel.
        labels: class of each entry [S], or None.
        keys: what the guide's similarity compares with a query, [S, E], float32 or bfloat16; None: kept in the
            lists alone.
        centre: mean key of the entries [E], before the similarity embeds it.
        prior: logits of p(a | M) [S].
        fingerprint: of the parameters that made all this.
        lists: the keys in inverted lists; None: a query is compared with every key.
    """

    entries: Shaped[Tensor, "S C height width"]
    labels: Int[Tensor, " S"] | None
    keys: Float[Tensor, "S E"] | None
    centre: Float[Tensor, " E"]
    prior: Float[Tensor, " S"]
    fingerprint: str
    lists: Lists | None = None

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        model: Model,
        guide: Guide,
        entries: Tensor,
        labels: Tensor | None,
        *,
        key_dtype: torch.dtype | None,
        search: InvertedLists | None,
        chunk_size: int,
        ranks: Ranks,
        show_progress: bool,
    ) -> Keys:
        """Compute the keys of all entries; arguments and errors as of `AddressIndex.encode`."""
        check_whole("chunk_size", chunk_size)
        _check(guide, entries, labels, key_dtype, search)
        with at_rest(model, guide):
            raw, prior = _keys_and_prior(model, guide, entries, chunk_size, show_progress)
        total = torch.zeros(raw.shape[1] + 1, dtype=torch.float64)  # of keys, and their number
        for part in raw.split(chunk_size):
            total[:-1] += part.double().sum(0)
            total[-1] += len(part)
        total = ranks.sum(total)
        centre = (total[:-1] / total[-1]).float()
        similarity: Any = copied(guide.similarity).cpu()
        lists = None
        if search is not None:
            lists = Lists.build(search, len(raw), lambda rows: similarity.embed(raw[rows], centre), ranks)
        keys = None
        if key_dtype is not None:
            keys = raw if key_dtype == raw.dtype else torch.empty(raw.shape, dtype=key_dtype)
            for part, into in zip(raw.split(CHUNK), keys.split(CHUNK), strict=True):
                into.copy_(similarity.embed(part, centre))
        return cls(_smallest(entries.cpu()), labels, keys, centre, prior, fingerprint_of(model, guide), lists)

    def save(self, path: Path) -> None:
        """Write all of it to one file, as a whole or not at all."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in content.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                content[name] = value.clone()  # a slice would bring what it was cut from
        if self.lists is not None:
            content["lists"] = self.lists.tensors()
        checkpoint.save(path, {"large_memory": content})

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read a file of `save`, which is mapped: it opens at once and is read as needed."""
        content = checkpoint.load(path, mmap=True).get("large_memory")
        if content is None:
            raise ValueError(f"checkpoint {path}: expected an address index, got another kind of checkpoint")
        lists = content.get("lists")  # files of before have none
        given = {field.name: content[field.name] for field in fields(cls) if field.name != "lists"}
        return cls(**given, lists=None if lists is None else Lists.of(lists))


def _smallest(entries: Tensor) -> Tensor:
    """Keep entries as bytes where these are the same values, as of binary images."""
    as_bytes = entries.to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.to(entries.dtype), entries) else entries


def _keys_and_prior(
    model: Model, guide: Guide, entries: Tensor, chunk_size: int, show_progress: bool
) -> tuple[Float[Tensor, "S E"], Float[Tensor, " S"]]:
    """Encode the entries chunk after chunk; keys before the similarity embeds them, and logits of p(a | M)."""
    networks = guide.networks
    device = next(iter(networks.parameters())).device
    raw = torch.empty(len(entries), networks.key_dim, dtype=torch.float32)
    prior = torch.empty(len(entries), dtype=torch.float32)
    starts = range(0, len(entries), chunk_size)
    for start in tqdm(starts, desc="encoding", unit="chunk", disable=not show_progress):
        part = slice(start, start + chunk_size)
        if entries.device.type == "cpu":  # as every look at values
            model.check_values(Memory(entries[part]), None)
        encoded = Memory(entries[part].to(device)).encode(networks)
        raw[part] = encoded.features.key.cpu()
        prior[part] = model.address_prior(encoded.encode(model.networks)).cpu()
    return raw, prior


def _check(
    guide: Guide,
    entries: Tensor,
    labels: Tensor | None,
    key_dtype: torch.dtype | None,
    search: InvertedLists | None,
) -> None:
    if isinstance(entries, Memory):
        raise ValueError(
            "entries: expected a tensor of images [S, ...], got a Memory; give `memory.entries[memory.mask]`, "
            "or `memory.entries` if all are entries"
        )
    if not isinstance(entries, Tensor):
        raise ValueError(f"entries: expected a tensor of images [S, ...], got {type(entries).__name__}")
    expected = guide.networks.image_shape
    if entries.dim() != 4 or tuple(entries.shape[1:]) != expected or len(entries) == 0:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"entries: expected shape [S, {shape}] with S >= 1, got {list(entries.shape)}")
    if labels is not None:
        check_labels("labels", labels, entries.shape[:1], None)
    if key_dtype not in (torch.float32, torch.bfloat16) and (key_dtype is not None or search is None):
        raise ValueError(f"key_dtype: expected torch.float32 or torch.bfloat16, got {key_dtype}")
    if search is not None:
        faiss_of("search")  # before the entries are encoded
    for part in ("embed", "log_scale"):
        if not hasattr(guide.similarity, part):
            raise ValueError(
                f"guide.similarity: expected `embed` and `log_scale`, so that keys are compared in chunks, got "
                f"{type(guide.similarity).__name__} without `{part}`"
            )
