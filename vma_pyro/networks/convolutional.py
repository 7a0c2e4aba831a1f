"""The paper's networks for Omniglot: convolutions, and a decoder that sees the entry's maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.networks.distinct import lookups
from vma_pyro.networks.interface import Distribution, Entry, Query
from vma_pyro.networks.keys import KeyNetwork
from vma_pyro.networks.layers import (
    ConvTranspose2d,
    OutputMaps,
    ResidualBlock,
    at_least_32_bits,
    dtype_of,
    initialise,
)
from vma_pyro.networks.pyramid import PyramidNetworks
from vma_pyro.networks.refinement import Refinement


class ConvNetworks(PyramidNetworks):
    """The convolutional networks of the paper for Omniglot (section 4 and supplement), for images of any size.

    A pyramid of pairs of 3x3 convolutions, the second with stride 2, a hidden layer to z, and a mirrored decoder
    with skip connections from the pyramid of m. The pairs halve the image until its longer side is at most 6:
    three pairs for the paper's images (28 -> 14 -> 7 -> 4), four for 64 x 64.

    # Departs from the paper: a skip connection adds a convolution of the entry's map to the decoder's instead of
    concatenating the maps, because both are the same linear map and the sum is computed once per entry rather
    than once per particle.

    Args:
        latent_dim: Z, dimension of z; the paper has 64.
        image_shape: [C, height, width] of one image: 1 or 3 colours, sides of 8 or more.
        width: factor on the 48 and 64 maps of the paper, rounded to multiples of 8 (fast on CPUs).
        key_dim: E, dimension of the embeddings that q(a | x) compares.
        hidden_dim: H, width of the hidden layers of p(z | m) and q(z | x, m).
        top_maps: maps of the pyramid's last layer, and the first of the decoder's; as many as of the layers before
            by default. Layers of z and keys see all of them, so that they hold most of the weights.
        blocks: how many of `ResidualBlock` after each halving but the last, in the pyramid and in the decoder; 0,
            as in the paper, by default.
        refinement: maps of the first stage of a `Refinement` of q(z | x, m); 0 for none, as in the paper.
        looks: how often a `Refinement` corrects it.
        key_maps: maps of the first stage of a `KeyNetwork`; 0 for none, as in the paper.
        copies: whether the decoder also sees the entry at its full size, and starts with its pixels as the mean of
            x. # Departs from the paper: levels of grey and colour hardly come through three halvings. By default
            what the likelihood wants: True for 8-bit images, False, as in the paper, for binary ones.
        channels, maps: what the decoder gives, see `PyramidNetworks`; by default what the likelihood wants.

    Raises:
        ValueError: a size that means nothing.
    """

    def __init__(
        self,
        latent_dim: int = 64,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        width: float = 1.0,
        key_dim: int = 128,
        hidden_dim: int = 256,
        top_maps: int | None = None,
        blocks: int = 0,
        refinement: int = 0,
        looks: int = 1,
        key_maps: int = 0,
        copies: bool | None = None,
        channels: int | None = None,
        maps: int | None = None,
    ) -> None:
        if latent_dim < 1 or width <= 0:
            raise ValueError(f"networks: expected latent_dim >= 1 and width > 0, got {latent_dim} and {width}")
        for name, number in (("refinement", refinement), ("key_maps", key_maps)):
            if number < 0:
                raise ValueError(f"{name}: expected a number of maps, or 0 for none, got {number}")
        if blocks < 0 or (top_maps is not None and top_maps < 1):
            raise ValueError(f"networks: expected blocks >= 0 and top_maps >= 1, got {blocks} and {top_maps}")
        colours, *sides = check_shape(image_shape)
        low, high = (max(8, 8 * round(number * width / 8)) for number in (48, 64))
        sizes = halvings(sides)  # of the images, and of the maps after each pair
        wide = [colours, low, low] + 2 * (len(sizes) - 2) * [high]
        wide[-1] = top_maps or wide[-1]
        layers = (nn.Conv2d(wide[i], wide[i + 1], 3, stride=1 + i % 2, padding=1) for i in range(len(wide) - 1))
        pyramid = nn.ModuleList(layers)
        self.top_shape = (wide[-1], *sizes[-1])
        super().__init__(
            pyramid,
            top=math.prod(self.top_shape),
            latent_dim=latent_dim,
            key_dim=key_dim,
            hidden_dim=hidden_dim,
            image_shape=(colours, sides[0], sides[1]),
            channels=channels,
            maps=maps,
        )
        # Layers are named after the layer of the pyramid that they see, or the height of the maps that they make.
        self.skipped = [2 * level for level in range(len(sizes) - 2, 0, -1)]
        self.heights = [height for height, _ in reversed(sizes[:-1])]
        for layer in self.skipped:
            self.add_module(f"skip{layer}", nn.Conv2d(wide[layer], high, 3, padding=1, bias=False))
        self.stem = nn.Linear(latent_dim, math.prod(self.top_shape))
        below = wide[-1]
        for level in range(len(sizes) - 2, -1, -1):
            (height, breadth), above = sizes[level], high if level else low
            # A transposed convolution doubles a side with a kernel of 4, and gives one less with a kernel of 3.
            up = ConvTranspose2d(below, above, (4 - height % 2, 4 - breadth % 2), stride=2, padding=1)
            self.add_module(f"up{height}", up)
            self.add_module(f"conv{height}", nn.Conv2d(above, above, 3, padding=1))
            below = above
        self.corrections = nn.ModuleDict(
            {
                name: nn.Sequential(*(ResidualBlock(high if up else wide[layer]) for _ in range(blocks)))
                for layer, (height, _) in zip(self.skipped, sizes[-2:0:-1], strict=True)
                for up, name in enumerate((f"down{layer}", f"up{height}"))
                if blocks
            }
        )
        self.low = low
        self.copies = bool(copies)
        if copies is None:
            self.undecided.add("copies")
        self.make_outputs()
        initialise(self, outputs=(self.to_key, self.hidden_to_posterior, self.to_prior[-1], self.to_logits))
        self.refinement: Refinement | None = None
        if refinement:
            self.refinement = Refinement(latent_dim, maps=refinement, image_shape=self.image_shape, looks=looks)
        self.keys: KeyNetwork | None = None
        if key_maps:
            self.keys = KeyNetwork(key_dim, maps=key_maps, colours=colours)
        # Channels last is 2.4 times as fast as the default layout on two CPU cores (forward and backward).
        self.to(memory_format=torch.channels_last)

    def make_outputs(self) -> None:
        """Make the layers on the decoder's last map: what says the pixels, and what more a likelihood wants."""
        colours = self.image_shape[0]
        if self.copies:
            self.skip0 = nn.Conv2d(colours, self.low, 3, padding=1, bias=False)
            self.log_copy = nn.Parameter(torch.zeros(()))
        # What is added to copied pixels starts at zero.
        layer = OutputMaps if self.copies else nn.Conv2d
        self.to_logits = layer(self.low, self.channels * colours, 3, padding=1)
        self.to_maps = OutputMaps(self.low, self.maps, 1) if self.maps else None

    def climb(self, images: Tensor) -> tuple[tuple[Tensor, ...], Float[Tensor, "N T"]]:
        """Return the maps of every second layer but the last, the smallest first, and the flattened last one."""
        maps = [images.contiguous(memory_format=torch.channels_last)]
        layers: Any = self.pyramid
        for number, layer in enumerate(layers, start=1):
            maps.append(self.corrected(f"down{number}", F.relu_(layer(maps[-1]))))
        seen = [*self.skipped, 0] if self.copies else self.skipped
        return tuple(maps[layer].permute(0, 2, 3, 1) for layer in seen), maps[-1].flatten(1)

    def skips(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Convolve the entry's maps for the decoder's skip connections, channels last; and the pixels to copy."""
        layers = [getattr(self, f"skip{layer}") for layer in self.skipped]
        copied: tuple[Tensor, ...] = ()
        if self.copies:
            layers.append(self.skip0)
            copied = (maps[-1].clamp(DARKEST, 1 - DARKEST).logit(),)
        made = (layer(m.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for layer, m in zip(layers, maps, strict=True))
        return (*made, *copied)

    def wanted(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the images where the refinement looks at them again."""
        return () if self.refinement is None else (images,)

    def key(self, images: Tensor, top: Tensor) -> Tensor:
        """See `PyramidNetworks.key`."""
        key = super().key(images, top)
        return key if self.keys is None else key + at_least_32_bits(self.keys(images))

    def marked(self, m: Entry, rows: Tensor) -> Entry:
        """Note which entries are the same, where q(z | x, m) costs enough to look for them."""
        return m._replace(rows=(rows,)) if self.refinement is not None and isinstance(m, Entry) else m

    def posterior(self, query: Query, m: Entry) -> Distribution:
        """See `Networks.posterior`; refined once where draws of an evaluation have image and entry in common."""
        if self.refinement is None:
            return super().posterior(query, m)
        found = lookups(query, m)
        if found is None:
            loc, scale = self.refined(query, m)
        else:
            loc, scale = map(found.spread, self.refined(found.query, found.m))
        return dist.Normal(loc, scale).to_event(1)

    def refined(self, query: Query, m: Entry) -> tuple[Tensor, Tensor]:
        """Location and scale of q(z | x, m) after further looks, each [..., B, Z]."""
        assert self.refinement is not None
        guess: Any = super().posterior(query, m)
        loc, scale = guess.base_dist.loc, guess.base_dist.scale
        for look in range(len(self.refinement.last_layers)):
            h = self.last_map(loc, m, loc.shape[:-1])
            logits = self.logits(h, m, loc.shape[:-1])[..., : self.image_shape[0], :, :]
            shift, log_factor = self.refinement(*query.images, *m.images, logits.sigmoid(), look)
            loc, scale = loc + shift, scale * log_factor.exp()
        return loc, scale

    def decode(self, z: Float[Tensor, "... Z"], m: Entry) -> Float[Tensor, "... C height width"]:
        """See `Networks.decode`."""
        # z and m may broadcast against each other (enumeration): flatten to one batch of images.
        batch = torch.broadcast_shapes(z.shape[:-1], m.stem.shape[:-1])
        h = self.last_map(z, m, batch)
        out = self.logits(h, m, batch)
        if self.to_maps is None:
            return out
        maps = at_least_32_bits(self.to_maps(h))
        return torch.cat([out, maps.reshape(*batch, *maps.shape[1:])], -3)

    def logits(self, h: Tensor, m: Entry, batch: torch.Size) -> Float[Tensor, "... C height width"]:
        """What is said of every pixel, the logits of the mean first, of the decoder's last map."""
        out = at_least_32_bits(self.to_logits(h))
        out = out.reshape(*batch, *out.shape[1:])
        if not self.copies:
            return out
        copied = self.log_copy.exp() * at_least_32_bits(m.skips[-1]).movedim(-1, -3)
        others = (self.channels - 1) * self.image_shape[0]  # channels that say nothing of the mean
        return out + (F.pad(copied, (0, 0, 0, 0, 0, others)) if others else copied)

    def last_map(
        self, z: Float[Tensor, "... Z"], m: Entry, batch: torch.Size
    ) -> Float[Tensor, "N C height width"]:
        """The decoder's last map, of all draws in one batch."""
        skips = [
            skip.expand(*batch, *skip.shape[-3:]).reshape(-1, *skip.shape[-3:]).permute(0, 3, 1, 2)
            for skip in m.skips[: len(self.heights)]
        ]  # in memory as channels last
        h = F.relu(self.stem(z.to(dtype_of(self.stem))) + m.stem).expand(*batch, -1).reshape(-1, *self.top_shape)
        h = h.contiguous(memory_format=torch.channels_last)
        for height, skip in zip_longest(self.heights, skips):
            h = F.relu_(getattr(self, f"up{height}")(h))
            h = getattr(self, f"conv{height}")(h)
            h = self.corrected(f"up{height}", F.relu_(h if skip is None else h + skip))
        return h

    def corrected(self, name: str, h: Tensor) -> Tensor:
        """Maps after the residual blocks of this name, if there are any."""
        out: Tensor = self.corrections[name](h) if name in self.corrections else h
        return out


DARKEST = 1 / 512  # of a copied pixel: half a level of 256 from black, as its logit has to be finite
LONGEST = 6  # side of the top of the pyramid


def halvings(sides: Sequence[int]) -> list[tuple[int, int]]:
    """List height and width of an image and of its maps, each half of that before (the larger half)."""
    sizes = [(sides[0], sides[1])]
    while max(sizes[-1]) > LONGEST:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def check_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Refuse what is no shape of an image, or of one that is too small for convolutions."""
    shape = tuple(image_shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 8:
        raise ValueError(
            f"image_shape: expected (1 or 3 colours, height, width) with sides of 8 or more, got {list(shape)}"
        )
    heights = [height for height, _ in halvings(shape[1:])[:-1]]
    if len(set(heights)) < len(heights):  # down to a single row long before the other side is short
        raise ValueError(f"image_shape: expected a width of at most 8 times the height, got {list(shape)}")
    return shape
