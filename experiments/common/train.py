"""Train model and guide in a folder of their own, and leave them there as a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer.elbo import ELBO

from vma_pyro._system.ranks import Ranks
from vma_pyro._system.record import command
from vma_pyro.cli import Stopped
from vma_pyro.data.episodes import Episode, Episodes
from vma_pyro.models import Pair, build, save
from vma_pyro.training import TrainConfig, fit


def train_pair(
    architecture: dict[str, Any],
    elbo: ELBO,
    episodes: Episodes,
    *,
    config: TrainConfig,
    folder: str | Path,
    data: str,
    validation: Sequence[Episode] = (),
    identity: dict[str, Any] | None = None,
    init: str | Path | None = None,
    only: str | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    label: str = "training",
) -> tuple[Pair, dict[str, Any]]:
    """Train model and guide, or go on with it, and leave them in the folder's `model.pt`.

    Args:
        architecture: see `models.build`.
        elbo, episodes, config, folder, validation, init, resume, tensorboard, label: see `fit`.
        data: name of the data set.
        identity: further plain values that a resumed run must share.
        only: the part of the networks that is trained, by name; None: all of them.

    Returns:
        Model and guide, and facts about the training: updates, seconds, validation NLL in nats per image.

    Raises:
        Stopped: told to, with a checkpoint left.
        ValueError, OSError, FloatingPointError: see `fit`.
    """
    torch.manual_seed(config.seed)
    pair = build(architecture)
    if only is not None:
        freeze_all_but(pair, only)
    result = fit(
        *pair,
        elbo,
        episodes,
        config=config,
        folder=folder,
        validation=validation,
        architecture=architecture,
        identity={"data": data, **(identity or {}), **architecture},
        init=init,
        resume=resume,
        tensorboard=tensorboard,
        label=label,
    )
    ranks = Ranks.present()
    if result.interrupted:
        ranks.wait()
        if ranks.rank > 0:
            sys.exit(128 + result.interrupted)
        raise Stopped(result.interrupted, result.updates)
    facts: dict[str, Any] = {
        "updates": result.updates,
        "training_seconds": round(result.seconds, 1),
        "validation_nll": result.validation_nll,
    }
    if result.stopped_early:
        facts["stopped_early"] = True
    if result.budget_changes:
        facts["budget_changes"] = list(result.budget_changes)
    if result.cycles:
        facts |= {"validation_nll_before": result.validation_nll_before, "cycles": list(result.cycles)}
    if ranks.rank == 0:
        save(
            Path(folder) / "model.pt",
            pair,
            architecture,
            data=data,
            training=(identity or {}) | facts | {"command": command()},
        )
    return pair, facts


def as_many(config: TrainConfig, updates: int) -> TrainConfig:
    """Exactly so many updates, whatever clock and validation say, for a model that is compared with another."""
    return replace(config, updates=updates, minutes=None, patience=max(config.patience, updates))


def freeze_all_but(pair: Pair, part: str) -> None:
    """Train only one part of the networks that model and guide share.

    Raises:
        ValueError: the networks have no such part.
    """
    networks: Any = pair[0].networks
    chosen = getattr(networks, part, None)
    if chosen is None:
        raise ValueError(f"train_only: expected networks with a {part}, got ones without; give --{part} a size")
    for module in pair:
        module.requires_grad_(False)
    chosen.requires_grad_(True)
