"""Which parameters made something that is kept: a memory's keys belong to one model and guide."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.double import in_double
from vma_pyro._system.outline import Outline, names_of_modules

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model


def fingerprint_of(model: Model, guide: Guide) -> str:
    """Digest all that decides on keys and prior."""
    digest = hashlib.sha256("".join(kinds_of(model, guide)).encode())
    for name, value in _parameters(model, guide).items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def kinds_of(model: Model, guide: Guide) -> list[str]:
    """Describe the modules that the fingerprint covers, but for their parameters: classes and attributes."""
    return [
        f"{name} {type(module).__qualname__} {_attributes(module)}"
        for name, module in _modules(model, guide).items()
    ]


def _attributes(module: Any) -> list[Any]:
    """Describe what a module itself holds besides parameters and buffers."""
    left_out = {"training", "made_with", *names_of_modules()}
    return [(name, OUTLINE.of(value)) for name, value in sorted(vars(module).items()) if name not in left_out]


OUTLINE = Outline(
    of_tensor=lambda values: (tuple(values.shape), str(_sums(values.detach()).tolist())),
    of_function=lambda function: getattr(function, "__qualname__", ""),
)


def sums_of(model: Model, guide: Guide) -> Float[Tensor, "N two"]:
    """Sums of each tensor that the fingerprint covers: a cheap sign of change, for those seen before."""
    return torch.stack([_sums(value) for value in _parameters(model, guide).values()])


def _sums(value: Tensor) -> Float[Tensor, " two"]:
    """Add all elements, and all with different weights: other orders of the same ones are told apart."""
    flat = in_double(value).flatten().cpu()
    weights = torch.linspace(1, 2, len(flat), dtype=flat.dtype) ** 2
    return torch.stack([flat.sum(), flat @ weights])


def _modules(model: Model, guide: Guide) -> dict[str, nn.Module]:
    """All modules but those of the model's likelihood, in which keys and prior have no part, each once."""
    found: dict[nn.Module, str] = {}
    for of, program in (("guide", guide), ("model", model)):
        for name, module in program.named_modules():
            if of == "guide" or name.split(".")[0] != "likelihood":
                found.setdefault(module, f"{of}.{name}")
    return {name: module for module, name in found.items()}


def _parameters(model: Model, guide: Guide) -> dict[str, Tensor]:
    """Parameters and buffers of these modules, those too that are in no checkpoint."""
    return {
        f"{of}.{name}": value.detach()
        for of, module in _modules(model, guide).items()
        for name, value in sorted([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
    }
