"""Optimizers by name."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from vma_pyro.training.layout import check_parameters
from vma_pyro.training.muon import Muon

# Learning rates: those of Muon and Adam chosen on held-out alphabets, SOAP's is Adam's and has not been tried.
RATES = {"muon": 4e-3, "adam": 1.5e-3, "soap": 1.5e-3}
ADAM_FIRST = 0.25  # of a run with Muon, before which z would learn too soon for the address
MOST = 1024  # rows of a preconditioner of SOAP's; larger ones are left out
OPTIMIZERS = tuple(RATES)


def check_optimizer(name: str) -> None:
    """Refuse a name that is unknown, or whose package is not installed.

    Raises:
        ValueError: it is.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "soap" and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ValueError(
            "optimizer: soap wants the package pytorch-optimizer (pip install pytorch-optimizer), found none"
        )


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, *, bf16: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer of a module's parameters.

    Args:
        name: muon, which needs `progress` in every group; adam; or soap, Adam in the eigenbases of Shampoo's
            preconditioners (Vyas et al. 2024), made anew every 10 updates, of the package pytorch-optimizer.
        module: whose parameters that require a gradient are moved.
        learning_rate: of all parameters.
        bf16: whether Muon's products of matrices are in bfloat16.

    Raises:
        ValueError: a parameter that is complex, or has gaps or repetitions in memory.
    """
    check_parameters(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, learning_rate, fused=True)
    if name == "soap":
        from pytorch_optimizer import SOAP  # an optional package

        return SOAP(parameters, learning_rate, weight_decay=0.0, max_precondition_dim=MOST)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Muon(module, learning_rate, adam_first=ADAM_FIRST, dtype=dtype)
