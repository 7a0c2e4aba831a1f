"""NLL with and without a memory, and how much samples vary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import protocols
from vma_pyro import models
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.data import ImageClasses, NestedEpisodes
from vma_pyro.evaluation import Diversity, TwoPhase, sample_diversity


def knows_none(facts: Mapping[str, Any]) -> bool:
    """Whether a model was trained with blank memories, in its last cycle or one before."""
    return any(cycle.get("blank", 0) for cycle in (*facts.get("cycles", ()), facts))


def nlls(
    pair: models.Pair, nested: NestedEpisodes, config: Any, device: torch.device, *, knows_none: bool
) -> dict[str, Any]:
    """NLLs by number of examples in memory, refined ones, and what the memory is worth, paired by image."""
    networks: Any = pair[0].networks
    alone: models.Pair = (
        MemorylessModel(networks, likelihood=pair[0]._modules["likelihood"]),
        MemorylessGuide(networks),
    )

    def nll(shots: int, refine: int = 0) -> TwoPhase:
        # The targets of an episode do not depend on the memory, which the memoryless program leaves alone.
        targets = partial(nested.episodes, 1, max(1, shots))
        options: dict[str, Any] = {"device": device, "refine": refine}
        return protocols.nll(pair if shots else alone, targets, config.samples, **options)

    wanted = {*config.shots, *(range(min(20, nested.examples)) if config.joint else ())}
    found = {shots: nll(shots) for shots in sorted(wanted - {0})}
    made: dict[str, Any] = {}
    if knows_none:
        found[0] = nll(0)
        made["worth"] = {str(s): found[0].minus(found[s]).estimate()._asdict() for s in config.shots}
        if config.joint:
            made["joint"] = mean_of(list(found.values())).estimate()._asdict()
    made["nll"] = {str(shots): each.estimate()._asdict() for shots, each in sorted(found.items())}
    if config.refine:
        made["refined"] = {str(s): nll(s, config.refine).estimate()._asdict() for s in config.shots}
    return made


def mean_of(figures: list[TwoPhase]) -> TwoPhase:
    """The mean of several figures of the same images, image by image."""
    return TwoPhase(*(torch.stack(each).mean(0) for each in zip(*figures, strict=True)))


def diversity(pair: models.Pair, judge: Any, test: ImageClasses, config: Any, device: torch.device) -> Diversity:
    """How much samples vary, in the judge's embedding of length one."""
    whole = torch.from_numpy(np.flatnonzero(test.counts == test.examples))
    order = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(config.seed))]
    rows = torch.from_numpy(test.offsets)[order[: config.diverse], None] + torch.arange(test.examples)
    classes = test.as_float(torch.from_numpy(np.ascontiguousarray(test.pixels))[rows]).to(device)

    def embed(images: Tensor) -> Tensor:
        key: Tensor = judge.networks.query(images).key
        return torch.nn.functional.normalize(key, dim=-1)

    return sample_diversity(pair[0], embed, classes, seed=config.seed)
