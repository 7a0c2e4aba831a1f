"""Inverted lists of keys: candidates for a query among many millions, without a look at every key.

Keys are sorted into lists, each around a centroid (IVF: Sivic & Zisserman 2003); a query looks into the few lists
whose centroids fit it best. In the lists a key has half precision or, product-quantised (Jégou et al. 2011), a few
bytes. The work is done by faiss, which the extra `index` brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vma_pyro._system.ranks import Ranks
from vma_pyro._system.whole import check_whole

PER_CENTROID = 64  # keys that a centroid is learned from
CODEWORDS = 256  # of each byte of a product-quantised key
FOR_CODEWORDS = 16384  # keys that they are learned from
CHUNK = 65536  # keys sorted into lists at a time
HALF_MAX = 65504.0


@dataclass(frozen=True)
class InvertedLists:
    """How an index of many millions of entries finds candidates; the support of q(a | x, M) are the best of them.

    Args:
        nlist: lists; None: the largest power of two up to the root of |M|, so that lists grow as their number
            does.
        nprobe: lists looked into per query, at most `nlist`; None: 16, or all. More are looked into for a query
            whose lists hold fewer entries than the support.
        code_size: bytes per key in the lists, product-quantised, a divisor of E; None: half precision, 2 E bytes.
        support: entries per query to which q gives a probability, at most |M|.

    Raises:
        ValueError: no whole number of at least 1, more lists looked into than there are.
    """

    nlist: int | None = None
    nprobe: int | None = None
    code_size: int | None = None
    support: int = 1024

    def __post_init__(self) -> None:
        for name in ("nlist", "nprobe", "code_size", "support"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value)
        if self.nlist is not None and self.nprobe is not None and self.nprobe > self.nlist:
            raise ValueError(f"nprobe: expected at most {self.nlist}, the number of lists, got {self.nprobe}")

    def sized(self, size: int, dimensions: int) -> tuple[int, int]:
        """Return the numbers of lists and of those looked into, for so many keys of so many dimensions.

        Raises:
            ValueError: more lists than keys, more looked into than lists, codes that do not divide the dimensions
                or have too few keys to be learned from.
        """
        nlist = self.nlist or 2 ** int(math.log2(math.sqrt(size)))
        if nlist > size:
            raise ValueError(f"nlist: expected at most {size}, the entries of the memory, got {nlist}")
        if self.nprobe is not None and self.nprobe > nlist:
            raise ValueError(f"nprobe: expected at most {nlist}, the number of lists, got {self.nprobe}")
        if self.code_size is not None and dimensions % self.code_size:
            raise ValueError(f"code_size: expected a divisor of E = {dimensions}, got {self.code_size}")
        if self.code_size is not None and size < CODEWORDS:
            raise ValueError(f"code_size: expected at least {CODEWORDS} entries to learn codes from, got {size}")
        return nlist, self.nprobe or min(16, nlist)


class Lists:
    """The lists of this process's keys.

    Args:
        found: the faiss index.
        nprobe: lists looked into per query; may be set anew.
        support: entries per query, of all processes together.
    """

    def __init__(self, found: Any, nprobe: int, support: int) -> None:
        self.found, self.nprobe, self.support = found, nprobe, support

    @classmethod
    def build(
        cls, options: InvertedLists, size: int, keys: Callable[[Tensor], Float[Tensor, "n E"]], ranks: Ranks
    ) -> Lists:
        """Learn the centroids from some keys of all processes, and sort this process's keys into lists.

        Args:
            options: numbers of the lists.
            size: S, keys of this process.
            keys: function that gives those of some rows int64 [n], float32 [n, E].
            ranks: the processes that hold the keys together; each learns the same centroids.

        Raises:
            ValueError: faiss is not installed; keys that are not finite or beyond half precision; numbers that do
                not fit (see `InvertedLists.sized`).
        """
        faiss = faiss_of("search")
        shares = [int(n) for n in ranks.gather(torch.tensor([size]))]
        total, offset = sum(shares), sum(shares[: ranks.rank])
        dimensions = keys(torch.zeros(1, dtype=torch.long)).shape[1]
        nlist, nprobe = options.sized(total, dimensions)
        learned_from = min(total, max(PER_CENTROID * nlist, FOR_CODEWORDS if options.code_size else 0))
        rows = torch.arange(learned_from) * total // learned_from - offset
        here = (rows >= 0) & (rows < size)
        examples = torch.zeros(learned_from, dimensions, dtype=torch.float32)
        examples[here] = _checked(keys(rows[here]), options)
        found = _empty(faiss, dimensions, nlist, options.code_size)
        found.train(ranks.sum(examples).numpy())
        for start in range(0, size, CHUNK):
            part = keys(torch.arange(start, min(size, start + CHUNK)))
            found.add(_checked(part, options).numpy())
        return cls(found, nprobe, options.support)

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in the lists: code and address of each."""
        return int(self.found.ntotal) * (int(self.found.code_size) + 8)

    def search(self, query: Float[Tensor, "B E"], nprobe: int) -> tuple[Float[Tensor, "B P"], Int[Tensor, "B P"]]:
        """Find the P entries with the largest inner products among those of the `nprobe` lists looked into.

        Returns:
            The inner products with the keys as the lists hold them, and rows of this process, -1 where the lists
            hold fewer; P is the support, or all entries of this process if they are fewer.

        Raises:
            ValueError: queries that are not finite; no list to look into.
        """
        check_whole("nprobe", nprobe)
        faiss = faiss_of("search")
        if not bool(query.isfinite().all()):
            raise ValueError("x: expected keys of the images that are finite, got others")
        number = min(self.support, int(self.found.ntotal))
        parameters = faiss.SearchParametersIVF(nprobe=min(nprobe, int(self.found.nlist)))
        score, row = self.found.search(query.contiguous().numpy(), number, params=parameters)
        return torch.from_numpy(score), torch.from_numpy(row)

    def tensors(self) -> dict[str, Any]:
        """Return all of it as tensors and numbers, for a file."""
        from faiss.contrib.inspect_tools import get_invlist

        faiss = faiss_of("search")
        found, lists = self.found, range(int(self.found.nlist))
        sizes = torch.tensor([found.invlists.list_size(number) for number in lists])
        rows = torch.empty(int(found.ntotal), dtype=torch.long)
        codes = torch.empty(int(found.ntotal), int(found.code_size), dtype=torch.uint8)
        end = 0
        for number in lists:
            row, code = get_invlist(found.invlists, number)
            part = slice(end, end := end + len(row))
            rows[part], codes[part] = torch.from_numpy(row), torch.from_numpy(code)
        centroids = torch.from_numpy(found.quantizer.reconstruct_n(0, found.nlist))
        product = getattr(found, "pq", None)
        codewords = None if product is None else torch.from_numpy(faiss.vector_to_array(product.centroids))
        numbers = {"nprobe": self.nprobe, "support": self.support}
        parts = {"centroids": centroids, "sizes": sizes, "rows": rows, "codes": codes, "codewords": codewords}
        return numbers | parts

    @classmethod
    def of(cls, content: dict[str, Any]) -> Lists:
        """Make them again from `tensors`; nothing of faiss's own format is read, so a stranger's file is safe.

        Raises:
            ValueError: faiss is not installed; parts that do not fit each other.
        """
        faiss = faiss_of("path")
        centroids, sizes, rows, codes = (content[name] for name in ("centroids", "sizes", "rows", "codes"))
        codewords = content["codewords"]
        found = _empty(faiss, centroids.shape[1], len(centroids), None if codewords is None else codes.shape[1])
        fits = codes.shape == (len(rows), found.code_size) and codes.dtype == torch.uint8
        fits = fits and len(sizes) == len(centroids) and bool((sizes >= 0).all()) and int(sizes.sum()) == len(rows)
        fits = fits and torch.equal(rows.sort().values, torch.arange(len(rows)))
        fits = fits and (codewords is None or len(codewords) == centroids.shape[1] * CODEWORDS)
        if not fits:
            raise ValueError("path: expected inverted lists whose parts fit each other, got others")
        found.quantizer.add(centroids.numpy())
        if codewords is not None:
            faiss.copy_array_to_vector(codewords.numpy(), found.pq.centroids)
        found.is_trained, found.ntotal = True, len(rows)
        end = 0
        for number, size in enumerate(sizes.tolist()):
            part = slice(end, end := end + size)
            row, code = (np.ascontiguousarray(each[part].numpy()) for each in (rows, codes))
            if size:
                found.invlists.add_entries(number, size, faiss.swig_ptr(row), faiss.swig_ptr(code))
        return cls(found, content["nprobe"], content["support"])


def faiss_of(argument: str) -> Any:
    """Import faiss, with as many threads as torch has.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"{argument}: expected faiss installed for inverted lists, found none; pip install 'vma-pyro[index]'"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _empty(faiss: Any, dimensions: int, nlist: int, code_size: int | None) -> Any:
    centroids = faiss.IndexFlatIP(dimensions)
    if code_size is None:
        kind, half = faiss.IndexIVFScalarQuantizer, faiss.ScalarQuantizer.QT_fp16
        found = kind(centroids, dimensions, nlist, half, faiss.METRIC_INNER_PRODUCT, False)
    else:
        found = faiss.IndexIVFPQ(centroids, dimensions, nlist, code_size, 8, faiss.METRIC_INNER_PRODUCT)
        found.pq.cp.min_points_per_centroid = 1
    found.cp.min_points_per_centroid = 1  # else it warns where tests have few
    return found


def _checked(keys: Tensor, options: InvertedLists) -> Tensor:
    if not bool(keys.isfinite().all()):
        raise ValueError("entries: expected keys that are finite, got others")
    if options.code_size is None and bool((keys.abs() > HALF_MAX).any()):
        raise ValueError(f"entries: expected keys up to {HALF_MAX:g}, as half precision holds, got larger ones")
    return keys
