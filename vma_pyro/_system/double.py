"""Double precision where a device has it; an Apple GPU has none."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def in_double(values: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device has none: sums over thousands of samples keep their digits."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).double()


def widest_float(device: torch.device) -> torch.dtype:
    """Choose float64, or float32 where the device has no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
