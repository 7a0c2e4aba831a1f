"""The training loop, on Lightning Fabric.

A run is a function of its configuration: stopped at any moment and resumed, it gives the figures of an
uninterrupted one, bit for bit on a CPU (with a budget in updates; one in minutes depends on the clock).
"""

from vma_pyro._system.allocator import keep_freed_memory
from vma_pyro.training.config import TrainConfig, device_of, device_of_name, learning_rate, precision_of
from vma_pyro.training.loop import FitResult, fit
from vma_pyro.training.processes import check_shares

__all__ = [
    "FitResult",
    "TrainConfig",
    "check_shares",
    "device_of",
    "device_of_name",
    "fit",
    "keep_freed_memory",
    "learning_rate",
    "precision_of",
]
