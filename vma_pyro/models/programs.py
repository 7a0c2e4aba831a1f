"""The programs of this package by their names: from strings to a model and its guide, and back."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from vma_pyro._system.parts import module_of
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.guide import Guide
from vma_pyro.likelihoods import (
    BernoulliPixels,
    Causal,
    CausalBernoulli,
    CausalLogistics,
    ContinuousBernoulli,
    DiscretizedLogistics,
    Likelihood,
)
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks

Pair = tuple[nn.Module, nn.Module]  # model and guide

LIKELIHOODS: dict[str, Any] = {
    "bernoulli": BernoulliPixels,
    "causal": CausalBernoulli,
    "continuous-bernoulli": ContinuousBernoulli,
    "logistics": DiscretizedLogistics,
    "causal-logistics": CausalLogistics,
}
CONTEXT = ("radius", "hidden", "layers", "steps", "alone")  # arguments of `Causal`, beside the pixels
PROGRAMS = ("memory", "memoryless", "soft", "soft-guided")
NETWORKS: dict[Any, Any] = {"conv": ConvNetworks, "mlp": MLPNetworks}


def build(architecture: dict[str, Any]) -> Pair:
    """Make model and guide on fresh networks.

    Args:
        architecture: `networks`, "conv" or "mlp", and `program`, one of `PROGRAMS`; perhaps `likelihood`, one of
            `LIKELIHOODS` ("bernoulli" by default), with `context_radius` and other `CONTEXT` of a causal one;
            every other item is an argument of the networks.

    Raises:
        ValueError: networks or a program that are not known, arguments that the networks do not take.
    """
    options = dict(architecture)
    kind, program = options.pop("networks", None), options.pop("program", None)
    pixels = options.pop("likelihood", "bernoulli")
    context = {name: options.pop(f"context_{name}", None) for name in CONTEXT}
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
    likelihood: Likelihood | None = make_likelihood(pixels, networks.image_shape[0], **context)
    if pixels == "bernoulli":
        likelihood = None  # the models' own, which a class of one's own may say by a method
    if program == "memory":
        return Model(networks, likelihood=likelihood), Guide(networks)
    if program == "memoryless":
        return MemorylessModel(networks, likelihood=likelihood), MemorylessGuide(networks)
    guide = SoftAttentionGuide(networks, target_guided=program == "soft-guided")
    return SoftAttentionModel(networks, likelihood=likelihood), guide


def make_likelihood(name: Any, colours: int, **context: Any) -> Likelihood:
    """Make a likelihood of images with so many colours by its name.

    Args:
        name: one of `LIKELIHOODS`.
        colours: of the images.
        context: `CONTEXT` of a causal one, see `Causal`; None for its default.

    Raises:
        ValueError: an unknown name, a radius or weight where there is no neighbourhood.
    """
    if not isinstance(name, str) or name not in LIKELIHOODS:
        raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {name!r}")
    kind = LIKELIHOODS[name]
    options = {option: value for option, value in context.items() if value is not None}
    if issubclass(kind, Causal):
        made: Likelihood = kind(colours=colours, **options)
        return made
    if options:
        option, value = next(iter(options.items()))
        raise ValueError(f"context_{option}: expected it with a causal likelihood, got {value} with {name}")
    plain: Likelihood = kind()
    return plain


def likelihood_of(model: Any) -> str:
    """Name which of `LIKELIHOODS` a model has; else the class of it, or of the model whose method says it."""
    part = model._modules.get("likelihood")
    by_method = not isinstance(getattr(type(model), "likelihood", None), property)
    return name_of_likelihood(class_name(type(model if part is None or by_method else part)))


def name_of_likelihood(kind: str) -> str:
    """Name one of `LIKELIHOODS` by its class as files say it; else give that."""
    return {class_name(known): name for name, known in LIKELIHOODS.items()}.get(kind, kind)


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
