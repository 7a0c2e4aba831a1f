"""Training a model and its guide in a folder of their own, where they are left as a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pyro.infer.elbo import ELBO

from common.peak import peak_so_far
from vma_pyro import models
from vma_pyro._system.command import command
from vma_pyro._system.ranks import Ranks
from vma_pyro.cli import Stopped, option
from vma_pyro.data.episodes import Episode, Episodes
from vma_pyro.infer import make
from vma_pyro.models import Pair
from vma_pyro.training import FitResult, TrainConfig, fit, precision_of

TrainOptions = Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]  # on the command line by their own names


def train_pair(
    pair: Pair,
    elbo: ELBO,
    episodes: Episodes,
    *,
    config: TrainConfig,
    folder: str | Path,
    data: str,
    validation: Sequence[Episode] = (),
    identity: dict[str, Any] | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    label: str = "training",
) -> dict[str, Any]:
    """Train model and guide, or go on with it, and leave them in the folder's `model.pt`.

    Args:
        pair: model and guide, with the weights that they start from.
        elbo, episodes, config, folder, validation, init, resume, tensorboard, label: see `fit`.
        data: name of the data set.
        identity: further plain values that a resumed run must share, and that the file tells of the training.

    Returns:
        Facts about the training: updates, seconds, GiB that this process has needed at most, validation NLL in
        nats per image.

    Raises:
        Stopped: the run was told to stop, and has left a checkpoint.
        ValueError, OSError, FloatingPointError: see `fit`.
    """
    chosen = {"data": data, **(identity or {})}
    result = fit(
        *pair,
        elbo,
        episodes,
        config=config,
        folder=folder,
        validation=validation,
        identity=chosen,
        init=init,
        resume=resume,
        tensorboard=tensorboard,
        label=label,
    )
    ranks = Ranks.present()
    if result.interrupted:
        ranks.wait()
        if ranks.rank > 0:  # the first process alone tells how to go on
            sys.exit(128 + result.interrupted)
        raise Stopped(result.interrupted, result.updates)
    facts = _facts(result, config)
    if ranks.rank == 0:
        told = (identity or {}) | facts | {"command": command()}
        models.save(Path(folder) / "model.pt", pair, data=data, training=told)
    return facts


def _facts(result: FitResult, config: TrainConfig) -> dict[str, Any]:
    """What a report says of a training run that has ended."""
    facts: dict[str, Any] = {
        "updates": result.updates,
        "training_seconds": round(result.seconds, 1),
        "peak_gib": round(peak_so_far(), 2),
        "validation_nll": result.validation_nll,
        "optimizer": config.optimizer,
        "precision": precision_of(config),
    }
    if result.compiled:
        facts["compiled"] = True
    if result.stopped_early:
        facts["stopped_early"] = True
    if result.budget_changes:
        facts["budget_changes"] = list(result.budget_changes)
    if result.cycles:
        facts |= {"validation_nll_before": result.validation_nll_before, "cycles": list(result.cycles)}
    return facts


def loaded_facts(path: Path) -> dict[str, Any]:
    """Facts about a model that is loaded: where it is, and what its file says of its training."""
    return {"loaded_from": str(path), **models.facts_of(path)}


def make_elbo(estimator: str, particles: int) -> ELBO:
    """An estimator by its name; what it refuses is said of the options `estimator` and `particles`."""
    with option("estimator", instead_of="name"), option("particles", instead_of="num_particles"):
        return make(estimator, particles)


def as_many(config: TrainConfig, updates: int) -> TrainConfig:
    """Training for so many updates, whatever clock and validation say, as a comparison needs it."""
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
