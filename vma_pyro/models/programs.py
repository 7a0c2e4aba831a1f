"""The programs of this package by their names: from strings to a model and its guide, and back."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from vma_pyro._system.parts import module_of
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.guide import Guide
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks

Pair = tuple[nn.Module, nn.Module]  # model and guide

PROGRAMS = ("memory", "memoryless", "soft", "soft-guided")
NETWORKS: dict[Any, Any] = {"conv": ConvNetworks, "mlp": MLPNetworks}


def build(architecture: dict[str, Any]) -> Pair:
    """Make model and guide on fresh networks.

    Args:
        architecture: `networks`, "conv" or "mlp", and `program`, one of `PROGRAMS`; every other item is an
            argument of the networks.

    Raises:
        ValueError: networks or a program that are not known, arguments that the networks do not take.
    """
    options = dict(architecture)
    kind, program = options.pop("networks", None), options.pop("program", None)
    if not isinstance(kind, str) or kind not in NETWORKS or program not in PROGRAMS:
        raise ValueError(
            f"architecture: expected networks {' or '.join(NETWORKS)} and a program among {', '.join(PROGRAMS)}, "
            f"got {kind!r} and {program!r}"
        )
    try:
        networks: Networks = NETWORKS[kind](**options)
    except TypeError as error:
        raise ValueError(
            f"architecture: expected arguments of {NETWORKS[kind].__name__}, got {options}"
        ) from error
    if program == "memory":
        return Model(networks), Guide(networks)
    if program == "memoryless":
        return MemorylessModel(networks), MemorylessGuide(networks)
    return SoftAttentionModel(networks), SoftAttentionGuide(networks, target_guided=program == "soft-guided")


def program_of(pair: Pair) -> str:
    """Name which of `PROGRAMS` a model and its guide are, or derive from; else the class of the model."""
    model, guide = pair
    known = (kind for kind in (MemorylessModel, SoftAttentionModel, Model) if isinstance(model, kind))
    return name_program(class_name(next(known, type(model))), guided=getattr(guide, "target_guided", False))


def name_program(model: str, *, guided: bool = False) -> str:
    """Name which of `PROGRAMS` a model is by the name of its class; else give that name.

    Args:
        model: see `class_name`.
        guided: whether its guide is target-guided.
    """
    soft = "soft-guided" if guided else "soft"
    known = {MemorylessModel: "memoryless", SoftAttentionModel: soft, Model: "memory"}
    return {class_name(kind): name for kind, name in known.items()}.get(model, model)


def class_name(kind: type) -> str:
    """The name of a class as files say it: "module:Qualified.Name".

    A class of this package goes by the outermost module that has it, so that files survive a move within. A
    module that imports its names when they are asked for is asked: earlier uses must not change what a file says.
    """
    module = module_of(kind)
    while module.startswith("vma_pyro."):
        outer = module.rpartition(".")[0]
        if getattr(sys.modules[outer], kind.__qualname__, None) is not kind:
            break
        module = outer
    return f"{module}:{kind.__qualname__}"
