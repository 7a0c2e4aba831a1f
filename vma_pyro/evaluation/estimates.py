"""What all evaluations share: means with standard errors, and leaving everything as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn


class Estimate(NamedTuple):
    """A mean over images.

    Attributes:
        mean: in the unit of the quantity (nats per image unless said otherwise).
        se: standard error of the mean over the images.
        n: number of images.
    """

    mean: float
    se: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per image, [n]."""
        values = values.double()
        n = values.numel()
        se = values.std().item() / math.sqrt(n) if n > 1 else math.nan
        return cls(values.mean().item(), se, n)

    def __str__(self) -> str:
        """Mean and standard error."""
        return f"{self.mean:.2f} ± {self.se:.2f}"


@contextmanager
def undisturbed(*modules: Any, seed: int) -> Iterator[None]:
    """No gradients, evaluation mode and an own random stream; all is restored on leaving."""
    roots = [module for module in modules if isinstance(module, nn.Module)]
    training = {module: module.training for root in roots for module in root.modules()}
    # Seeding reaches every GPU, whatever the device of the evaluation.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        torch.manual_seed(seed)
        for root in roots:
            root.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def distribution_at(trace: poutine.Trace, site: str) -> Any:
    """The distribution of a site; Pyro's types say no more than that it is callable."""
    return trace.nodes[site]["fn"]
