"""Trained models, and their files: a checkpoint says what its programs are, and they are rebuilt from that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vma_pyro import pretrained
from vma_pyro._system import checkpoint
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.guide import Guide
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks
from vma_pyro.training import check_weights, provenance_of

Pair = tuple[nn.Module, nn.Module]  # model and guide

PRETRAINED = pretrained.WORD

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


def save(path: str | Path, pair: Pair, architecture: dict[str, Any], **facts: Any) -> None:
    """Write weights with what is needed to rebuild their programs, and facts (plain values) to go with them.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    content = {"architecture": architecture, "program": provenance_of(*pair)}
    checkpoint.save(path, content | {"weights": as_one(pair).state_dict()} | facts)


def load(path: str | Path, *, program: str | tuple[str, ...] | None = None) -> Pair:
    """Rebuild model and guide from a file of `save`, or from a run's checkpoint.

    Args:
        path: of the file.
        program: refuse any other than this one, or these; None takes all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or another program.
    """
    content = checkpoint.load(pretrained.file_of(path))
    architecture = content.get("architecture", {})
    found = architecture.get("program")
    wanted = (program,) if isinstance(program, str) else program
    if found is None or (wanted is not None and found not in wanted):
        kinds = " or ".join(wanted or ["trained"])
        raise ValueError(f"checkpoint {path}: expected a {kinds} model, got {architecture or 'none'}")
    pair = build(architecture)
    read_weights(pair, path)
    return pair


def read_weights(pair: Pair, path: str | Path) -> None:
    """Take over the weights of the same programs.

    Args:
        pair: model and guide, built as those in the file.
        path: of a file of `save`, or of a run's checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or one of other programs: by their architecture, or by what they
            give on an example.
    """
    content = checkpoint.load(pretrained.file_of(path))
    if "weights" not in content:
        raise ValueError(f"checkpoint {path}: expected weights, got {', '.join(content)}")
    # What an estimator learned for itself (a baseline) is not needed any more.
    weights = {k: v for k, v in content["weights"].items() if k.startswith(("model.", "guide."))}
    checkpoint.restore(as_one(pair), weights, name=f"{path} as it says of itself")
    check_weights(content.get("program"), *pair, file=str(path))


def facts_of(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: its architecture, and how and on which data it was trained if that is known."""
    content = checkpoint.load(pretrained.file_of(path))
    known = dict(content.get("training", {}))
    if "progress" in content:  # of a run, perhaps an unfinished one
        progress = content["progress"]
        known = content["identity"] | {
            "updates": progress["update"],
            "training_seconds": round(progress["seconds"], 1),
            "validation_nll": progress["best_nll"],
            "finished": progress["finished"],
        }
        known |= {"cycles": content["cycles"]} if content.get("cycles") else {}
    known |= content.get("architecture", {})
    return known | ({"data": content["data"]} if "data" in content else {})


def updates_of(facts: Mapping[str, Any]) -> str:
    """How many updates are behind trained weights, cycle by cycle: "60,000 + 21,000"."""
    return " + ".join(f"{cycle['updates']:,}" for cycle in (*facts.get("cycles", ()), facts))


def on(device: torch.device, pair: Pair) -> Pair:
    """Both on a device."""
    model, guide = pair
    return model.to(device), guide.to(device)


def as_one(pair: Pair) -> nn.Module:
    """Both as one module, with the parameters they share."""
    return MultiSampleELBO()(*pair)
