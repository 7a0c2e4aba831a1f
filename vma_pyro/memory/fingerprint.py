"""Which parameters made something that is kept: a memory's keys belong to one model and guide."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.double import in_double

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
    found = [f"guide {type(guide).__qualname__} {_attributes(guide)}"]
    found += [f"model {type(model).__qualname__} {_attributes(model)}"]
    for of, whole in _modules(model, guide).items():
        for name, module in whole.named_modules():
            found.append(f"{of}.{name} {type(module).__qualname__} {_attributes(module)}")
    return found


def _attributes(module: Any) -> list[str]:
    """Describe what a module itself holds: plain values, also in containers, tensors, and functions by name."""

    def said(value: Any) -> str | None:
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        if isinstance(value, Tensor):
            return f"{tuple(value.shape)} {_sums(value.detach()).tolist()}"
        if isinstance(value, tuple | list):
            return str([said(item) for item in value])
        if isinstance(value, dict):
            return str([(repr(key), said(item)) for key, item in value.items()])
        return getattr(value, "__qualname__", None)

    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "made_with")}
    return [f"{name}={said(value)}" for name, value in sorted(own.items())]


def sums_of(model: Model, guide: Guide) -> Float[Tensor, "N two"]:
    """Sums of each tensor that the fingerprint covers: a cheap sign of change, for those seen before."""
    return torch.stack([_sums(value) for value in _parameters(model, guide).values()])


def _sums(value: Tensor) -> Float[Tensor, " two"]:
    """Add all elements, and all with different weights: other orders of the same ones are told apart."""
    flat = in_double(value).flatten().cpu()
    weights = torch.linspace(1, 2, len(flat), dtype=flat.dtype) ** 2
    return torch.stack([flat.sum(), flat @ weights])


def _modules(model: Model, guide: Guide) -> dict[str, Any]:
    modules = {"networks": guide.networks, "similarity": guide.similarity, "prior": model.address_prior}
    tied = model.networks is guide.networks
    return modules if tied else modules | {"model": model.networks}


def _parameters(model: Model, guide: Guide) -> dict[str, Tensor]:
    return {
        f"{of}.{name}": value.detach()
        for of, module in _modules(model, guide).items()
        for name, value in sorted(module.state_dict(keep_vars=True).items())
    }
