"""Trained models as files: a checkpoint says what its programs are, and they are rebuilt from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vma_pyro import checkpoint
from vma_pyro.baselines import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.guide import Guide
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks

Pair = tuple[nn.Module, nn.Module]  # model and guide

PROGRAMS = ("memory", "memoryless", "soft", "soft-guided")


def build(architecture: dict[str, Any]) -> Pair:
    """Model and guide on fresh networks.

    Args:
        architecture: `networks`, "conv" or "mlp", and `program`, one of `PROGRAMS`; every other item is an
            argument of the networks.

    Raises:
        ValueError: networks or a program that are not known, arguments that the networks do not take.
    """
    options = dict(architecture)
    kind, program = options.pop("networks", None), options.pop("program", None)
    known: dict[Any, Any] = {"conv": ConvNetworks, "mlp": MLPNetworks}
    if kind not in known or program not in PROGRAMS:
        raise ValueError(
            f"architecture: expected networks {' or '.join(known)} and a program among {', '.join(PROGRAMS)}, got "
            f"{kind!r} and {program!r}"
        )
    try:
        networks: Networks = known[kind](**options)
    except TypeError as error:
        raise ValueError(f"architecture: expected arguments of {known[kind].__name__}, got {options}") from error
    if program == "memory":
        return Model(networks), Guide(networks)
    if program == "memoryless":
        return MemorylessModel(networks), MemorylessGuide(networks)
    return SoftAttentionModel(networks), SoftAttentionGuide(networks, target_guided=program == "soft-guided")


def save(path: Path, pair: Pair, architecture: dict[str, Any], **facts: Any) -> None:
    """Write weights with what is needed to rebuild their programs, and facts (plain values) to go with them.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    checkpoint.save(path, {"architecture": architecture, "weights": as_one(pair).state_dict(), **facts})


def load(path: Path, *, program: str | None = None) -> Pair:
    """Rebuild model and guide from a file of `save`, or from a run's checkpoint.

    Args:
        path: of the file.
        program: refuse any other; None takes all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or another program.
    """
    content = checkpoint.load(path)
    architecture = content.get("architecture", {})
    found = architecture.get("program")
    if found is None or (program is not None and found != program):
        raise ValueError(
            f"checkpoint {path}: expected a {program or 'trained'} model, got {architecture or 'none'}"
        )
    pair = build(architecture)
    # What an estimator learned for itself (a baseline) is not needed any more.
    weights = {k: v for k, v in content["weights"].items() if k.startswith(("model.", "guide."))}
    checkpoint.restore(as_one(pair), weights, name=f"{path} as it says of itself")
    return pair


def facts_of(path: Path) -> dict[str, Any]:
    """What a file says of itself: its architecture, and the data that it was trained on if that is known."""
    content = checkpoint.load(path)
    data = content.get("data", content.get("identity", {}).get("data"))
    return content.get("architecture", {}) | ({} if data is None else {"data": data})


def as_one(pair: Pair) -> nn.Module:
    """Both as one module, with the parameters they share."""
    return MultiSampleELBO()(*pair)
