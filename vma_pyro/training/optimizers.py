"""Optimizers by name."""

from __future__ import annotations

import torch
from torch import nn

from vma_pyro.training.muon import Muon

RATES = {"muon": 4e-3, "adam": 1.5e-3}  # chosen on held-out alphabets, see `experiments/optimizers.py`
ADAM_FIRST = 0.25  # of a run with Muon, before which z would learn too soon for the address
OPTIMIZERS = tuple(RATES)


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, *, bf16: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer of a module's parameters.

    Args:
        name: muon, which needs `progress` in every group, or adam.
        module: whose parameters that require a gradient are moved.
        learning_rate: of all parameters.
        bf16: whether Muon's products of matrices are in bfloat16.
    """
    if name == "adam":
        return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], learning_rate, fused=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Muon(module, learning_rate, adam_first=ADAM_FIRST, dtype=dtype)
