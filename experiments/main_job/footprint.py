"""The memory that one update takes, from a few small ones: too much of it ends a run without a word."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vma_pyro.data import Episode

OVERHEAD = 1.5  # what the backward pass holds beside what the forward pass has left for it; measured 1.2 to 1.4
COPIES = 6  # of each weight: gradient, two moments, average, best


def bytes_of_update(
    model: nn.Module,
    guide: nn.Module,
    elbo: Callable[[int], ELBO],
    episode: Callable[[int], Episode],
    *,
    particles: int,
    queries: int,
    device: torch.device,
) -> float:
    """Estimate the bytes that one update needs: constant + images (per image + particles per particle).

    Args:
        model, guide: on the device.
        elbo: the objective with so many particles.
        episode: one with so many images.
        particles: K of the update in question.
        queries: its images.
        device: where it is to be made.
    """
    few, more = min(particles, 2), min(particles, 4)
    one, two = min(queries, 2), min(queries, 4)

    def peak(k: int, images: int) -> float:
        e = episode(images).to(device)
        return peak_bytes(elbo(k)(model, guide), e)

    start = peak(few, one)
    per_particle = 0.0 if more == few else (peak(more, one) - start) / ((more - few) * one)
    per_image = 0.0
    if two > one:
        per_image = (peak(few, two) - start) / (two - one) - per_particle * few
    constant = start - one * (per_image + few * per_particle)
    weights = sum(p.numel() * p.element_size() for p in {*model.parameters(), *guide.parameters()})
    return OVERHEAD * (constant + queries * (per_image + particles * per_particle)) + COPIES * weights


def peak_bytes(loss_fn: nn.Module, episode: Episode) -> int:
    """Measure the most that tensors hold at once in a forward pass; the backward pass is only seen to run."""
    # Of a small one the backward pass would hide it: the gradients of the weights are the most of that.
    with torch.random.fork_rng(), Storages() as storages:
        loss = loss_fn(episode.memory, episode.x)
    loss.backward()
    loss_fn.zero_grad()
    return storages.peak


class Storages(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._total = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation itself, and count what it has made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._total += storage.nbytes() - (0 if known is None else known[1])
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._total > self.peak:  # some of it may be gone
            self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
            self._total = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._total)


def available(device: torch.device) -> float:
    """Count the bytes that can still be had: of the GPU, or of the machine within the limits on this process."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [_of_machine(), *_of_groups(), _of_process()]
    return min(found)


def _of_machine() -> float:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")


def _of_groups() -> list[float]:
    """Count the bytes within the limits of the process's control groups, of either version."""
    found = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, kinds, path = line.split(":", 2)
        v2 = kinds == ""
        if not v2 and "memory" not in kinds.split(","):
            continue
        root = Path("/sys/fs/cgroup") if v2 else Path("/sys/fs/cgroup/memory")
        limit, used = (
            ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        here = root / path.lstrip("/")
        for group in (here, *here.parents):
            if group.is_relative_to(root):
                found.append(_left(group / limit, group / used, group / "memory.stat"))
    return found


def _left(limit: Path, used: Path, statistics: Path) -> float:
    most, now = (next(iter(_lines(path)), "max") for path in (limit, used))
    if not (most.isdigit() and now.isdigit()):
        return float("inf")
    cached = [int(line.split()[1]) for line in _lines(statistics) if line.startswith("inactive_file ")]
    return float(int(most) - int(now) + sum(cached))  # the cache of files gives way


def _of_process() -> float:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return float("inf")
    pages = next(iter(_lines(Path("/proc/self/statm"))), "0").split()[0]
    return float(soft - int(pages) * resource.getpagesize())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
