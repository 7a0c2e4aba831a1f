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
def undisturbed(*modules: Any, seed: int, device: torch.device) -> Iterator[None]:
    """No gradients, evaluation mode and an own random stream; all is restored on leaving."""
    modules = tuple(m for m in modules if isinstance(m, nn.Module))
    training = [m.training for m in modules]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.train(mode)


def distribution_at(trace: poutine.Trace, site: str) -> Any:
    """The distribution of a site; Pyro's types say no more than that it is callable."""
    return trace.nodes[site]["fn"]
