"""Training on several processes: what each does alone, and what all must agree on.

Started by `torchrun`, every process draws the same episodes and takes its share of the images; the gradients are
averaged, so that the update is that of one process with all images. Noise is each process's own. Process 0 writes.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from vma_pyro._system.ranks import Ranks
from vma_pyro.data import Episode
from vma_pyro.training.config import TrainConfig, device_of


def start_fabric(config: TrainConfig, ranks: Ranks) -> Any:
    """Start Lightning Fabric for this process alone, or for all that `torchrun` has started."""
    from lightning_fabric import Fabric  # seconds to import
    from lightning_fabric.strategies import DDPStrategy

    accelerator: Any = device_of(config).type
    if ranks.size == 1:
        return Fabric(accelerator=accelerator, devices=1)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=ranks.size // local,
        strategy=DDPStrategy(static_graph=True),  # parts of the networks may be left alone, always the same ones
    )
    fabric.launch()
    return fabric


def take_share(episode: Episode, ranks: Ranks) -> Episode:
    """Take this process's images of an episode, and their memories.

    Raises:
        ValueError: images that cannot be shared out equally.
    """
    if ranks.size == 1:
        return episode
    each = check_shares(len(episode.x), ranks)
    mine = slice(ranks.rank * each, (ranks.rank + 1) * each)
    return Episode(episode.memory.datapoints(mine), episode.x[mine], episode.labels[mine])


def check_shares(queries: int, ranks: Ranks) -> int:
    """Count the images of each process.

    Raises:
        ValueError: they cannot be shared out equally.
    """
    each, left = divmod(queries, ranks.size)
    if left:
        raise ValueError(f"queries: expected a multiple of {ranks.size}, the number of processes, got {queries}")
    return each


def mean_over(ranks: Ranks, total: torch.Tensor, count: int) -> float:
    """Take the mean of values of which each process has some."""
    both = ranks.sum(torch.stack([total.cpu().double(), torch.tensor(float(count), dtype=torch.float64)]))
    return (both[0] / both[1]).item()
