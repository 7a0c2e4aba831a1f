"""Weights in 16 or 8 bits, for files: rounded first, so that the file holds exactly what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BITS = (16, 8)
LEVELS = 127  # of the codes of 8 bits, in each direction


def round_to(weights: Tensor, bits: int) -> Tensor:
    """The nearest weights that so many bits hold.

    With 16 they are those of float16. With 8, each row of a matrix (or layer of convolutions: what has one place
    along the first dimension) has a scale and codes from -127 to 127; vectors, which are few, have 16 bits.

    Args:
        weights: of any shape, with fractions.
        bits: 16 or 8.

    Raises:
        ValueError: other bits.
    """
    kept = _kept(weights, bits)
    return _restored(kept).to(weights.dtype) if isinstance(kept, dict) else kept.to(weights.dtype)


def packed(weights: Mapping[str, Tensor], bits: int) -> dict[str, Any]:
    """Weights for a file, of which so many bits hold each exactly; what has no fractions stays.

    Model and guide share weights, which are one tensor by two names: a file holds them once.

    Raises:
        ValueError: weights that so many bits do not hold exactly, see `round_to`.
    """
    held: dict[tuple[int, torch.Size], Any] = {}
    found: dict[str, Any] = {}
    for name, value in weights.items():
        if not value.is_floating_point():
            found[name] = value
            continue
        place = (value.data_ptr(), value.shape)
        if place not in held:
            held[place] = _kept(value, bits)
        kept = held[place]
        again = _restored(kept) if isinstance(kept, dict) else kept
        if not torch.equal(again.to(value.dtype), value):
            raise ValueError(f"bits: expected weights that {bits} bits hold exactly, got others in '{name}'")
        found[name] = kept
    return found


def unpacked(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as they were packed, or as they are, where they were not.

    Raises:
        ValueError: codes without a scale, or others that `packed` does not write.
    """
    found: dict[str, Any] = {}
    for name, value in weights.items():
        if isinstance(value, dict):
            codes, scale = value.get("codes"), value.get("scale")
            whole = isinstance(codes, Tensor) and codes.dtype == torch.int8 and codes.dim() > 1
            if not (whole and isinstance(scale, Tensor) and scale.shape == codes.shape[:1]):  # type: ignore[union-attr]
                raise ValueError(f"expected weights or codes with a scale for each row, got others in '{name}'")
            value = _restored(value)
        found[name] = value
    return found


def _kept(weights: Tensor, bits: int) -> Any:
    """What a file holds of them: a tensor of 16 bits, or codes with the scale of each row."""
    if bits not in BITS:
        raise ValueError(f"bits: expected {' or '.join(map(str, BITS))}, got {bits}")
    if bits == 16 or weights.dim() < 2:
        kept = weights.to(torch.float16)
        if not bool((kept.isfinite() | ~weights.isfinite()).all()):
            raise ValueError(
                f"bits: expected weights of at most 65504 in 16 bits, got {weights.abs().max().item():g}"
            )
        return kept
    rows = weights.float()
    most = rows.flatten(1).abs().amax(1)
    # A scale of few digits, cut off: codes times it are exact, the largest is 127, and so all are their own again.
    scale = ((most / LEVELS).view(torch.int32) & ~0xFFFF).view(torch.float32)
    each = scale.view(-1, *(1 for _ in rows.shape[1:]))
    codes = (rows / torch.where(each > 0, each, 1.0)).round().clamp(-LEVELS, LEVELS)
    return {"codes": codes.to(torch.int8), "scale": scale}


def _restored(kept: Mapping[str, Tensor]) -> Tensor:
    codes, scale = kept["codes"], kept["scale"]
    return codes.float() * scale.view(-1, *(1 for _ in codes.shape[1:]))
