"""What a processor does fast."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply in bfloat16; without them it is slower than float32.

    On an x86 processor AVX512_BF16 or AMX, on an NVIDIA GPU those since Ampere. An Apple GPU is said to have none,
    as nothing was tried there.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Of torch 2.6 and later; what says so for other processors came later than that, under another name.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_matrices_in_bf16(device: torch.device) -> bool:
    """Whether products of a few hundred rows are faster in bfloat16 than in float32.

    With AVX512_BF16 alone convolutions are, and such products take twice the time (seen on an Intel processor).
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return multiplies_bf16(device)
