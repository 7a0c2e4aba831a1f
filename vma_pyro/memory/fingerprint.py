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
    """Describe the modules that the fingerprint covers, but for their tensors: class and plain attributes."""
    found = []
    for of, module in _modules(model, guide).items():
        plain = {
            k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"
        }
        found.append(f"{of} {type(module).__qualname__} {sorted(plain.items())}")
    return found


def sums_of(model: Model, guide: Guide) -> Float[Tensor, " N"]:
    """The sum of each tensor that the fingerprint covers: a cheap sign of change, for those seen before."""
    return torch.stack([in_double(value).sum().cpu() for value in _parameters(model, guide).values()])


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
