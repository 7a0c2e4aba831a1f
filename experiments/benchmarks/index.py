"""Very large memories: what inverted lists find, what they cost, and what the bound loses.

Keys are those of the published model: of Omniglot images, and of others moved as distortions move keys (see
`stretched.py`). Every kind of index runs in a process of its own, with one thread; times are of the processor.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from figures import BenchmarkConfig, write
from index_page import page
from machine import in_own_process, peak_so_far
from stretched import Repeating, Stretched, angle_between
from tqdm import tqdm

from common.timing import Spread
from vma_pyro import Guide, InvertedLists, Model, cli, load_pretrained
from vma_pyro.data import glyphs, omniglot
from vma_pyro.evaluation import large_log_likelihood
from vma_pyro.memory.addresses import best_of_both

KINDS = ("exact, float32", "exact, bfloat16", "lists, half precision", "lists, codes")
K = 10  # of the exact top K, found again or not


@dataclass(frozen=True)
class IndexConfig(BenchmarkConfig):
    """Build indices of growing memories, and ask them."""

    sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """|M|."""
    nlist: tuple[int, ...] = (256, 512, 1024)
    """Lists at each size."""
    nprobe: tuple[int, ...] = (4, 16, 64)
    """Lists looked into; the second is the default."""
    code_size: int = 16
    """Bytes of a product-quantised key."""
    images_per_class: int = 12
    """Encoded images of each Omniglot character."""
    moves: int = 4096
    """Distorted images, whose keys say how keys move."""
    queries: int = 64
    """Images that are not in the memory, each of another character."""
    bounds: int = 24
    """Of these, images whose bound is estimated."""
    top: int = 32
    """Entries that a bound adds up."""
    num_samples: int = 10
    """z per entry."""
    data: str = "omniglot"
    """Images: omniglot or glyphs."""
    data_dir: Path | None = None
    """Folder of Omniglot."""


def main(config: IndexConfig) -> None:
    """Measure and write."""
    if config.tiny:
        small: dict[str, Any] = {
            "sizes": (300, 500),
            "nlist": (4, 8),
            "nprobe": (1, 2, 4),
            "images_per_class": 6,
            "moves": 40,
        }
        config = replace(config, **small, queries=3, bounds=2, top=4, num_samples=2, data="glyphs")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stretched.pt"
        about = prepare(config, file)
        run = (lambda function, *given: function(*given)) if config.tiny else in_own_process
        rows = [row for kind in tqdm(KINDS, desc="kinds") for row in run(measured, kind, config, file)]
    options = {name: value for name, value in asdict(config).items() if not isinstance(value, Path | type(None))}
    content = {"options": options, "about": about, "rows": rows}
    write(config.output, "index", "Very large memories", content, page(content, K), device=torch.device("cpu"))


def published() -> tuple[Model, Guide]:
    """The model that comes with the package."""
    return cast("tuple[Model, Guide]", load_pretrained())


def prepare(config: IndexConfig, file: Path) -> dict[str, float]:
    """Encode images, and find what exact addressing says of every size; both go to the file."""
    model, guide = published()
    if config.data == "omniglot":
        whole = torch.from_numpy(omniglot.load(config.data_dir, split="background").images)
        other = torch.from_numpy(omniglot.load(config.data_dir, split="evaluation").images)
        images = torch.cat([whole, other])
    else:
        images = torch.from_numpy(glyphs.load(classes=20).images)
    classes = torch.linspace(0, len(images) - 1, config.queries).long()
    x = images[classes, -1, None].float()
    base = images[:, : config.images_per_class].flatten(0, 1).unsqueeze(1)
    stretched = Stretched.of(model, guide, base, moves=config.moves)
    entries = stretched.index((model, guide), config.sizes[0], dtype=torch.float32, search=None)
    with torch.no_grad():
        query, scale = entries._query(x)
    truth = {size: exactly(stretched, query, scale, size) for size in config.sizes}
    torch.save({"x": x, "query": query, "scale": scale, "stretched": vars(stretched), "truth": truth}, file)
    moved = stretched.keys[: len(stretched.moves)] + stretched.moves
    random = torch.randperm(len(base), generator=torch.Generator().manual_seed(0))[: len(moved)]
    turned = angle_between(stretched.keys[: len(moved)], moved)
    return {
        "images": len(base),
        "scale": scale.item(),
        "degrees_moved": turned,
        "degrees_apart": angle_between(stretched.keys[: len(random)], stretched.keys[random]),
    }


def exactly(stretched: Stretched, query: torch.Tensor, scale: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """The best entries and the log normaliser of q(a | x, M), keys made and forgotten chunk after chunk."""
    best, where = torch.full((len(query), K), -math.inf), torch.zeros(len(query), K, dtype=torch.long)
    total = torch.full((len(query),), -math.inf)
    for rows in tqdm(torch.arange(size).split(65536), desc=f"exact, |M| = {size}", leave=False):
        logits = scale * (query @ stretched(rows).T)
        total = torch.logaddexp(total, logits.logsumexp(1))
        values, at = logits.topk(K, dim=1)
        best, where = best_of_both(best, where, values, rows[at])
    return {"best": best, "address": where, "total": total}


def measured(kind: str, config: IndexConfig, file: Path) -> list[dict[str, Any]]:
    """One kind of index at every size, and codes also beside the keys themselves."""
    cli.set_up()  # the process may be a new one
    torch.set_num_threads(1)
    given = torch.load(file, weights_only=True)
    stretched, programs = Stretched(**given["stretched"]), published()
    rows = []
    for size, nlist in zip(config.sizes, config.nlist, strict=True):
        code_size = config.code_size if kind == "lists, codes" else None
        search = InvertedLists(nlist=nlist, nprobe=config.nprobe[1], code_size=code_size)
        dtype = None if kind.startswith("lists") else getattr(torch, kind.removeprefix("exact, "))
        start = time.process_time(), time.perf_counter()
        index = stretched.index(programs, size, dtype=dtype, search=search if dtype is None else None)
        seconds = {"build_seconds": time.process_time() - start[0], "build_wall": time.perf_counter() - start[1]}
        row = {"kind": kind, "memory": size, "nlist": None if dtype else nlist, **seconds}
        rows.append(row | {"peak_gib": peak_so_far()} | asked(index, given, config))
        if code_size is not None:
            keys = stretched.kept(size, torch.bfloat16)
            index = Repeating(*programs, replace(index.kept, keys=keys), stretched.images)
            row["kind"] = f"{kind}, and keys in bfloat16"
            rows.append(row | {"peak_gib": peak_so_far()} | asked(index, given, config))
    return rows


def asked(index: Repeating, given: dict[str, Any], config: IndexConfig) -> dict[str, Any]:
    """What the index answers: recall, mass of exact q in the support, bounds, and the time of a query."""
    x, kept = given["x"], index.kept
    found: dict[str, Any] = {"bytes": entry_bytes(index)}
    if kept.lists is None:
        found["probed"] = [look_up(index, given)]
    else:
        found["probed"] = []
        for nprobe in config.nprobe:
            kept.lists.nprobe = nprobe
            found["probed"].append({"nprobe": nprobe} | look_up(index, given))
        kept.lists.nprobe = config.nprobe[1]
    bounds = large_log_likelihood(index, x[: config.bounds], num_samples=config.num_samples, top=config.top)
    drawn = large_log_likelihood(index, x[: config.bounds], num_samples=config.num_samples * config.top)
    return found | {"bound": bounds.tolist(), "sampled_bound": drawn.tolist()}


def look_up(index: Repeating, given: dict[str, Any]) -> dict[str, Any]:
    """Recall of the exact top K, mass of q in the support in nats, processor milliseconds of a query."""
    x, truth = given["x"], given["truth"][index.size]
    query, scale, search = given["query"], given["scale"], index._search  # a query's key is made beforehand
    address = search.top(query, scale, K).address
    recall = (address[:, :, None] == truth["address"][:, None]).any(2).float().mean(1)
    one = [timed(partial(search.top, q, scale, K)) for q in query[:32].split(1)]
    many = [timed(lambda: search.top(query, scale, K)) / len(query) for _ in range(3)]
    seconds = {"one_query": one, "each_of_many": many, "embedding": [timed(lambda: index._query(x[:1]))]}
    found = {name: Spread.of([1e3 * s for s in each])._asdict() for name, each in seconds.items()}
    found["recall"] = Spread.of(recall.tolist())._asdict() | {"mean": recall.mean().item()}
    if index.kept.lists is not None:
        support = search.top(query, scale, search.support).address
        stretched = Stretched(**given["stretched"])
        keys = torch.stack([stretched(rows) for rows in support])
        logits = scale * torch.einsum("be,bpe->bp", query, keys)
        found["log_mass"] = (logits.logsumexp(1) - truth["total"]).clamp(max=0).mean().item()
    return found


def entry_bytes(index: Repeating) -> float:
    """Bytes per entry of what is looked at for candidates and probabilities: keys, codes, addresses, p(a | M)."""
    kept = index.kept
    parts = [kept.prior.nbytes, 0 if kept.keys is None else kept.keys.nbytes]
    return (sum(parts) + (0 if kept.lists is None else kept.lists.nbytes)) / index.size


def timed(function: Callable[[], object]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    cli.run(main, IndexConfig, __doc__)
