"""Wider layers that go on from trained narrow ones, and give what those gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vma_pyro.likelihoods.neighbourhood import Neighbourhood

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def grown(programs: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give the weights of narrower layers the shapes of the programs' layers.

    Units that are new take their weights from the programs, where they are fresh, and no unit that was there
    before listens to them yet: its weights for them are zero. So every unit that was there gives what it gave, and
    the first updates give the new ones a say (as in Net2Net, Chen et al. 2016, but for copies, which would have to
    be told apart).

    Args:
        programs: with fresh weights; whatever looks at a layer's units must look at the new ones after the others.
        weights: of the same programs with narrower layers, by name.

    Returns:
        Weights of the shapes of the programs, but for those whose shapes do not differ by more units: they are as
        they were.
    """
    wide = programs.state_dict()
    found = dict(weights)
    for name, outputs in _layers(programs):
        if name in found and _is_narrower(found[name], wide[name], outputs):
            found[name] = _padded(found[name], wide[name], outputs)
    return found


def _layers(programs: nn.Module) -> Iterator[tuple[str, int]]:
    """Name the parameters of layers, and which dimension counts the outputs."""
    for prefix, module in programs.named_modules(remove_duplicate=False):  # model and guide share theirs
        if isinstance(module, (*LAYERS, *TRANSPOSED)):
            yield f"{prefix}.weight", int(isinstance(module, TRANSPOSED))
            yield f"{prefix}.bias", 0
        if isinstance(module, Neighbourhood):
            yield f"{prefix}.near", 0


def _is_narrower(narrow: Any, wide: Tensor, outputs: int) -> bool:
    """Whether two shapes differ by the number of inputs or outputs alone, the first two dimensions."""
    if not isinstance(narrow, Tensor) or narrow.dim() != wide.dim() or narrow.shape == wide.shape:
        return False
    return narrow.shape[2:] == wide.shape[2:] and all(
        a <= b for a, b in zip(narrow.shape[:2], wide.shape[:2], strict=True)
    )


def _padded(narrow: Tensor, wide: Tensor, outputs: int) -> Tensor:
    """The narrow weights among the wide ones, none of whose new inputs has a weight for an old output."""
    padded = wide.clone()
    size = narrow.shape[outputs]
    padded.narrow(outputs, 0, size).zero_()
    block = padded[tuple(slice(length) for length in narrow.shape)]
    block.copy_(narrow.to(torch.promote_types(narrow.dtype, wide.dtype)))
    return padded
