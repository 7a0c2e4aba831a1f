"""The paper's networks for MNIST: multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.networks.interface import Entry
from vma_pyro.networks.layers import OutputMaps, at_least_32_bits, dtype_of, initialise
from vma_pyro.networks.pyramid import PyramidNetworks


class MLPNetworks(PyramidNetworks):
    """The paper's networks for MNIST: multilayer perceptrons with 256 and 128 ReLU units.

    Args:
        latent_dim: Z, dimension of z; the paper has 32.
        hidden_dims: units of the two hidden layers, bottom first.
        key_dim: E, dimension of the embeddings that q(a | x) compares.
        image_shape: shape of one image.
        copies: whether the logits also get the pixels of m, times a learned factor. # Departs from the paper: the
            top layer's units cannot carry every pixel, so that without it no entry is recalled exactly.
        channels, maps: what the decoder gives, see `PyramidNetworks`; by default what the likelihood wants. The
            maps are a convolution of the logits.
    """

    def __init__(
        self,
        latent_dim: int = 32,
        *,
        hidden_dims: Sequence[int] = (256, 128),
        key_dim: int = 128,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        copies: bool = False,
        channels: int | None = None,
        maps: int | None = None,
    ) -> None:
        bottom, top = hidden_dims
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        super().__init__(
            nn.Sequential(nn.Flatten(), nn.Linear(pixels, bottom), nn.ReLU(), nn.Linear(bottom, top), nn.ReLU()),
            top=top,
            latent_dim=latent_dim,
            key_dim=key_dim,
            hidden_dim=top,
            image_shape=image_shape,
            channels=channels,
            maps=maps,
        )
        self.stem = nn.Linear(latent_dim, top)
        self.bottom = bottom
        self.to_logits = nn.Sequential(
            nn.Linear(top, bottom), nn.ReLU(), nn.Linear(bottom, (channels or 1) * pixels)
        )
        self.make_outputs()
        self.copies = copies
        if copies:
            self.log_copy = nn.Parameter(torch.zeros(()))
        initialise(self, outputs=(self.to_key, self.hidden_to_posterior, self.to_prior[-1], self.to_logits[-1]))

    def make_outputs(self) -> None:
        """Make the last layer of the decoder, and what makes maps of its logits."""
        numbers = self.channels * self.image_shape[0]
        _, height, width = self.image_shape
        if self.to_logits[-1].out_features != numbers * height * width:
            self.to_logits[-1] = nn.Linear(self.bottom, numbers * height * width)
        self.to_maps = OutputMaps(numbers, self.maps, 3, padding=1) if self.maps else None

    def climb(self, images: Tensor) -> tuple[tuple[Tensor, ...], Float[Tensor, "N T"]]:
        """Return the pixels if they are to be copied, and the top layer."""
        return (images.permute(0, 2, 3, 1),) if self.copies else (), self.pyramid(images)

    def decode(self, z: Float[Tensor, "... Z"], m: Entry) -> Float[Tensor, "... C height width"]:
        """See `Networks.decode`."""
        logits = at_least_32_bits(self.to_logits(F.relu(self.stem(z.to(dtype_of(self.stem))) + m.stem)))
        colours, height, width = self.image_shape
        logits = logits.reshape(*logits.shape[:-1], self.channels * colours, height, width)
        others = (self.channels - 1) * colours  # channels that say nothing of the mean
        for pixels in m.skips:
            copied = self.log_copy.exp() * (2 * pixels - 1).movedim(-1, -3)
            logits = logits + (F.pad(copied, (0, 0, 0, 0, 0, others)) if others else copied)
        if self.to_maps is None:
            return logits
        maps = self.to_maps(logits.flatten(0, -4)).unflatten(0, logits.shape[:-3])
        return torch.cat([logits, at_least_32_bits(maps)], -3)
