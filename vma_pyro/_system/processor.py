"""What a processor does fast."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


def is_faster_in_bf16(device: torch.device) -> bool:
    """Whether layers are faster in bfloat16 than in float32.

    On an x86 processor with AMX, or with AVX512_BF16 if it is not Intel's: Intel's multiply in it at half the
    rate, so that nothing is gained and the conversions cost time, as was seen on one whose AMX a virtual machine
    hides (`experiments/optimizers.py --optimizers adam@32-true adam@bf16-mixed` times both in turns). On an NVIDIA
    GPU since Ampere. An Apple GPU is said not to be, as nothing was tried there.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (_has_amx() or (_has_avx512_bf16() and not _is_intels()))


def multiplies_matrices_in_bf16(device: torch.device) -> bool:
    """Whether products of matrices of a few hundred rows are faster in bfloat16; AVX512_BF16 is not enough."""
    return _has_amx() if device.type == "cpu" else is_faster_in_bf16(device)


# Of torch 2.6 and later; what says so for other processors came later than that, under other names.


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _has_avx512_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


@functools.cache
def _is_intels() -> bool:
    try:
        maker = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        maker = platform.processor()
    return "GenuineIntel" in maker
