"""A pyramid of its own for the keys, where one that also decodes is not enough to tell classes apart."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.networks.layers import in_full_precision


class KeyNetwork(Part):
    """What is added to the keys of targets and entries, from the images themselves.

    Four convolutional stages, of which each but the first halves the image, layer norms of the whole maps, and a
    mean over what is left of the places. The last layer starts at zero, so that trained networks without it go on
    as they were.

    # Departs from the paper: there the pyramid of the keys is that of the decoder, which has other things to keep.

    Args:
        key_dim: E.
        maps: of the first two stages; the later ones have twice as many.
        colours: C of the images.
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(self, key_dim: int, *, maps: int, colours: int) -> None:
        super().__init__()
        wide = [colours, maps, maps, 2 * maps, 2 * maps]
        stages = [nn.Conv2d(wide[i], wide[i + 1], 3, stride=1 if i == 0 else 2, padding=1) for i in range(4)]
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in wide[1:])
        self.to_key = nn.Linear(wide[-1], key_dim)
        for stage in stages:
            nn.init.kaiming_normal_(stage.weight, nonlinearity="relu")
            nn.init.constant_(stage.bias, 0.0)  # type: ignore[arg-type]  # there is one
        nn.init.zeros_(self.to_key.weight)
        nn.init.zeros_(self.to_key.bias)

    def forward(self, images: Float[Tensor, "N C height width"]) -> Float[Tensor, "N E"]:
        """Return what is added to the keys."""
        h = images
        for stage, norm in zip(self.stages, self.norms, strict=True):
            h = F.relu(norm(stage(h)))
        return in_full_precision(self.to_key, h.mean((-2, -1)))
