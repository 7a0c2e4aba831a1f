"""A second look before z is drawn: q(z | x, m) corrected by what the decoder makes of its first guess."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro._system.whole import check_whole
from vma_pyro.networks.layers import OutputLayer


class Refinement(Part):
    """Corrections to location and log scale of q(z | x, m), from x, m and E[x | m, z] at the location.

    Three convolutional stages at 28, 14 and 7 pixels. The last layer starts at zero, so that trained networks
    without a refinement go on as they were.

    # Departs from the paper: its q(z | x, m) sees x and m only through the top of the pyramid that also makes the
    keys, and its distance from the best Gaussian is ten nats. What is wrong with a guess is easiest to see from
    the image that it gives (iterative inference, Marino et al. 2018, with a few learned steps).

    Args:
        latent_dim: Z, dimension of z.
        maps: of the first stage; the later ones have twice as many.
        image_shape: [C, height, width] of x and m.
        hidden_dim: width of the layer between the last stage and the corrections.
        looks: how often q(z | x, m) is corrected, each time by what the correction before it decodes to; all
            layers but the last serve all of them.
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(
        self,
        latent_dim: int,
        *,
        maps: int,
        image_shape: tuple[int, int, int],
        hidden_dim: int = 256,
        looks: int = 1,
    ) -> None:
        super().__init__()
        check_whole("looks", looks)
        colours, height, width = image_shape
        wide = 2 * maps
        self.stages = nn.ModuleList(
            [
                nn.Conv2d(3 * colours, maps, 3, padding=1),
                nn.Conv2d(maps, wide, 3, stride=2, padding=1),
                nn.Conv2d(wide, wide, 3, stride=2, padding=1),
                nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            ]
        )
        top = wide * -(-height // 8) * -(-width // 8)
        self.to_hidden = nn.Linear(top, hidden_dim)
        self.to_correction = nn.Linear(hidden_dim, 2 * latent_dim)
        self.to_more = nn.ModuleList(OutputLayer(hidden_dim, 2 * latent_dim) for _ in range(looks - 1))
        for layer in (*self.stages, self.to_hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.to_correction.weight)
        nn.init.zeros_(self.to_correction.bias)

    @property
    def last_layers(self) -> list[Any]:
        """The layers that give the corrections, one for each look."""
        return [self.to_correction, *self.to_more]

    def forward(
        self,
        x: Float[Tensor, "B C height width"],
        m: Float[Tensor, "*any C height width"],
        mean: Float[Tensor, "*batch C height width"],
        look: int = 0,
    ) -> tuple[Float[Tensor, "*batch Z"], Float[Tensor, "*batch Z"]]:
        """Return what a look adds to location and log scale, each [..., B, Z]; the images broadcast."""
        dtype = self.to_hidden.weight.dtype
        images = torch.cat([image.expand_as(mean).to(dtype) for image in (x, m, mean)], -3)
        h = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            h = F.relu_(stage(h))
        h = F.relu(self.to_hidden(h.flatten(1)))
        correction = self.last_layers[look](h).to(mean.dtype)
        loc, log_scale = correction.reshape(*mean.shape[:-3], -1).chunk(2, -1)
        return loc, log_scale
