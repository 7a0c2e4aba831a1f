"""Random streams of one's own: what is drawn inside changes nothing outside, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_noise(seed: int) -> Iterator[None]:
    """Draw from a stream that begins with the seed; the noise of all devices is restored on leaving."""
    # Seeding reaches every GPU, whatever the device of the draws.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus), _of_apple_gpu():
        torch.manual_seed(seed)
        yield


@contextmanager
def _of_apple_gpu() -> Iterator[None]:
    """`fork_rng` for the one device that it leaves out."""
    if not torch.backends.mps.is_available():
        yield
        return
    before = torch.mps.get_rng_state()
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)
