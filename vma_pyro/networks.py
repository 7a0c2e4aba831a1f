"""Encoders and decoders, plain torch: everything neural about p(z | m), p(x | z, m), q(a | x) and q(z | x, m).

One pyramid embeds the target x and the entries m (tied weights). What depends on m alone has two stages: `encode`,
once per entry, gives the key that every x is compared with; `heads` gives what is needed of entries that are read,
of those or of all, whichever are fewer. What remains per particle is cheap apart from the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.refinement import Refinement

MIN_SCALE = 1e-3  # keeps log q(z | x, m) finite when the posterior collapses on a point


class Query(NamedTuple):
    """What q(a | x) and q(z | x, m) need of the target x.

    Attributes:
        key: embedding compared with the keys of the entries [B, E].
        hidden: share of x in the hidden layer of q(z | x, m) [B, H].
        images: x itself, where q(z | x, m) is refined; else nothing.
    """

    key: Float[Tensor, "B E"]
    hidden: Float[Tensor, "B H"]
    images: tuple[Float[Tensor, "B C height width"], ...] = ()


class Encoded(NamedTuple):
    """What is computed of every memory entry.

    Attributes:
        key: embedding compared with the key of the target [N, E].
        top: output of the pyramid [N, T].
        maps: of lower layers, channels last [N, height, width, C].
        images: the entries themselves, where q(z | x, m) is refined; else nothing.
    """

    key: Float[Tensor, "N E"]
    top: Float[Tensor, "N T"]
    maps: tuple[Float[Tensor, "N height width C"], ...] = ()
    images: tuple[Float[Tensor, "N C height width"], ...] = ()


class Entry(NamedTuple):
    """What is computed of an entry that is read; each tensor starts with the shape of the address.

    Attributes:
        prior: location and raw scale of p(z | m) [..., 2 Z].
        hidden: share of m in the hidden layer of q(z | x, m) [..., H].
        stem: share of m in the first layer of the decoder [..., D].
        skips: shares of m in later layers of the decoder, channels last [..., height, width, C].
        images: m itself, where q(z | x, m) is refined; else nothing.
    """

    prior: Float[Tensor, "... loc_and_scale"]
    hidden: Float[Tensor, "... H"]
    stem: Float[Tensor, "... D"]
    skips: tuple[Float[Tensor, "... height width C"], ...] = ()
    images: tuple[Float[Tensor, "... C height width"], ...] = ()


@runtime_checkable
class Networks(Protocol):
    """The interface between the networks and the two files that users edit, model.py and guide.py.

    `heads` may be left out where `encode` computes everything.
    """

    latent_dim: int
    key_dim: int
    image_shape: tuple[int, int, int]

    def encode(self, entries: Tensor) -> Any:
        """Features of memory entries [N, 1, 28, 28], a `key` [N, E] among them; once per entry and update."""

    def heads(self, encoded: Any) -> Any:
        """What `prior`, `posterior` and `decode` need of entries, from their features; see `Memory.read`."""

    def query(self, x: Tensor) -> Query:
        """Features of targets [B, 1, 28, 28]."""

    def prior(self, m: Any) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """Location and scale of p(z | m), each [..., Z]."""

    def posterior(self, query: Query, m: Any) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """Location and scale of q(z | x, m), each [..., B, Z]."""

    def decode(self, z: Float[Tensor, "... Z"], m: Any) -> Float[Tensor, "... C height width"]:
        """Logits of p(x | z, m), [..., B, 1, 28, 28], for z [..., B, Z]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as of any torch module."""


class ConvNetworks(Part):
    """The convolutional networks of the paper for Omniglot (section 4 and supplement).

    A pyramid of six 3x3 convolutions, every second with stride 2 (28 -> 14 -> 7 -> 4), a hidden layer to z, and
    a mirrored decoder with skip connections from layers 2 and 4 of the pyramid of m.

    # Departs from the paper: a skip connection adds a convolution of the entry's map to the decoder's instead of
    # concatenating the maps, because both are the same linear map and the sum is computed once per entry rather
    # than once per particle.

    Args:
        latent_dim: Z, dimension of z; the paper has 64.
        width: factor on the 48 and 64 maps of the paper, rounded to multiples of 8 (fast on CPUs).
        key_dim: E, dimension of the embeddings that q(a | x) compares.
        hidden_dim: H, width of the hidden layers of p(z | m) and q(z | x, m).
        refinement: maps of the first stage of a `Refinement` of q(z | x, m); 0 for none, as in the paper.
    """

    image_shape = (1, 28, 28)

    def __init__(
        self,
        latent_dim: int = 64,
        *,
        width: float = 1.0,
        key_dim: int = 128,
        hidden_dim: int = 256,
        refinement: int = 0,
    ) -> None:
        super().__init__()
        if latent_dim < 1 or width <= 0:
            raise ValueError(f"networks: expected latent_dim >= 1 and width > 0, got {latent_dim} and {width}")
        if refinement < 0:
            raise ValueError(f"refinement: expected a number of maps, or 0 for none, got {refinement}")
        low, high = (max(8, 8 * round(maps * width / 8)) for maps in (48, 64))
        self.latent_dim, self.key_dim, self.high = latent_dim, key_dim, high
        channels = [1, low, low, high, high, high, high]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=1 + i % 2, padding=1) for i in range(6)
        )
        top = high * 4 * 4
        self.to_key = nn.Linear(top, key_dim)
        self.to_hidden = nn.Linear(top, hidden_dim)
        self.entry_to_hidden = nn.Linear(top, hidden_dim, bias=False)
        self.hidden_to_posterior = nn.Linear(hidden_dim, 2 * latent_dim)
        self.to_prior = nn.Sequential(nn.Linear(top, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * latent_dim))
        self.entry_to_stem = nn.Linear(top, top, bias=False)
        self.skip4 = nn.Conv2d(high, high, 3, padding=1, bias=False)
        self.skip2 = nn.Conv2d(low, high, 3, padding=1, bias=False)

        self.stem = nn.Linear(latent_dim, top)
        self.up7 = nn.ConvTranspose2d(high, high, 3, stride=2, padding=1)
        self.conv7 = nn.Conv2d(high, high, 3, padding=1)
        self.up14 = nn.ConvTranspose2d(high, high, 4, stride=2, padding=1)
        self.conv14 = nn.Conv2d(high, high, 3, padding=1)
        self.up28 = nn.ConvTranspose2d(high, low, 4, stride=2, padding=1)
        self.conv28 = nn.Conv2d(low, low, 3, padding=1)
        self.to_logits = nn.Conv2d(low, 1, 3, padding=1)
        initialise(self, outputs=(self.to_key, self.hidden_to_posterior, self.to_prior[-1], self.to_logits))
        self.refinement: Refinement | None = None
        if refinement:
            self.refinement = Refinement(latent_dim, maps=refinement, image_shape=self.image_shape)
        # Channels last is 2.4 times as fast as the default layout on two CPU cores (forward and backward).
        self.to(memory_format=torch.channels_last)

    def _climb(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of layers 2 and 4, and the flattened map of layer 6."""
        check_images("images", images, self.image_shape)
        maps = [images.to(dtype_of(self)).contiguous(memory_format=torch.channels_last)]
        for layer in self.pyramid:
            maps.append(F.relu_(layer(maps[-1])))
        return maps[2], maps[4], maps[6].flatten(1)

    def encode(self, entries: Tensor) -> Encoded:
        """See `Networks.encode`."""
        layer2, layer4, top = self._climb(entries)
        maps = (layer4.permute(0, 2, 3, 1), layer2.permute(0, 2, 3, 1))
        return Encoded(at_least_32_bits(self.to_key(top)), top, maps, self._wanted(entries))

    def _wanted(self, images: Tensor) -> tuple[Tensor, ...]:
        """The images themselves where q(z | x, m) looks at them again."""
        return () if self.refinement is None else (images.to(dtype_of(self)),)

    def heads(self, encoded: Encoded) -> Entry:
        """See `Networks.heads`."""
        layer4, layer2 = (m.permute(0, 3, 1, 2) for m in encoded.maps)
        return Entry(
            prior=at_least_32_bits(self.to_prior(encoded.top)),
            hidden=self.entry_to_hidden(encoded.top),
            stem=self.entry_to_stem(encoded.top),
            skips=(self.skip4(layer4).permute(0, 2, 3, 1), self.skip2(layer2).permute(0, 2, 3, 1)),
            images=encoded.images,
        )

    def query(self, x: Tensor) -> Query:
        """See `Networks.query`."""
        _, _, top = self._climb(x)
        return Query(at_least_32_bits(self.to_key(top)), self.to_hidden(top), self._wanted(x))

    def prior(self, m: Entry) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """See `Networks.prior`."""
        return gaussian(m.prior)

    def posterior(self, query: Query, m: Entry) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """See `Networks.posterior`."""
        loc, scale = gaussian(self.hidden_to_posterior(F.relu(query.hidden + m.hidden)))
        if self.refinement is None:
            return loc, scale
        shift, log_factor = self.refinement(*query.images, *m.images, self.decode(loc, m).sigmoid())
        return loc + shift, scale * log_factor.exp()

    def decode(self, z: Float[Tensor, "... Z"], m: Entry) -> Float[Tensor, "... C height width"]:
        """See `Networks.decode`."""
        # z and m may broadcast against each other (enumeration): flatten to one batch of images.
        batch = torch.broadcast_shapes(z.shape[:-1], m.stem.shape[:-1])
        skip7, skip14 = (
            skip.expand(*batch, *skip.shape[-3:]).reshape(-1, *skip.shape[-3:]).permute(0, 3, 1, 2)
            for skip in m.skips
        )  # [N, C, 7, 7] and [N, C, 14, 14], in memory as channels last
        h = F.relu(self.stem(z.to(dtype_of(self.stem))) + m.stem).expand(*batch, -1).reshape(-1, self.high, 4, 4)
        h = h.contiguous(memory_format=torch.channels_last)
        h = F.relu_(self.up7(h))
        h = F.relu_(self.conv7(h) + skip7)
        h = F.relu_(self.up14(h))
        h = F.relu_(self.conv14(h) + skip14)
        h = F.relu_(self.up28(h))
        h = F.relu_(self.conv28(h))
        return at_least_32_bits(self.to_logits(h)).reshape(*batch, *self.image_shape)


class MLPNetworks(Part):
    """The paper's networks for MNIST: multilayer perceptrons with 256 and 128 ReLU units.

    Args:
        latent_dim: Z, dimension of z; the paper has 32.
        hidden_dims: units of the two hidden layers, bottom first.
        key_dim: E, dimension of the embeddings that q(a | x) compares.
        image_shape: shape of one image.
        copies: whether the logits also get the pixels of m, times a learned factor. # Departs from the paper: the
            top layer's units cannot carry every pixel, so that without it no entry is recalled exactly.
    """

    def __init__(
        self,
        latent_dim: int = 32,
        *,
        hidden_dims: Sequence[int] = (256, 128),
        key_dim: int = 128,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        copies: bool = False,
    ) -> None:
        super().__init__()
        bottom, top = hidden_dims
        self.latent_dim, self.key_dim, self.image_shape = latent_dim, key_dim, image_shape
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.pyramid = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, bottom), nn.ReLU(), nn.Linear(bottom, top), nn.ReLU()
        )
        self.to_key = nn.Linear(top, key_dim)
        self.to_hidden = nn.Linear(top, top)
        self.entry_to_hidden = nn.Linear(top, top, bias=False)
        self.hidden_to_posterior = nn.Linear(top, 2 * latent_dim)
        self.to_prior = nn.Sequential(nn.Linear(top, top), nn.ReLU(), nn.Linear(top, 2 * latent_dim))
        self.entry_to_stem = nn.Linear(top, top, bias=False)
        self.stem = nn.Linear(latent_dim, top)
        self.to_logits = nn.Sequential(nn.Linear(top, bottom), nn.ReLU(), nn.Linear(bottom, pixels))
        self.copies = copies
        if copies:
            self.log_copy = nn.Parameter(torch.zeros(()))
        initialise(self, outputs=(self.to_key, self.hidden_to_posterior, self.to_prior[-1], self.to_logits[-1]))

    def encode(self, entries: Tensor) -> Encoded:
        """See `Networks.encode`."""
        check_images("images", entries, self.image_shape)
        entries = entries.to(dtype_of(self))
        top = self.pyramid(entries)
        maps = (entries.permute(0, 2, 3, 1),) if self.copies else ()
        return Encoded(key=at_least_32_bits(self.to_key(top)), top=top, maps=maps)

    def heads(self, encoded: Encoded) -> Entry:
        """See `Networks.heads`."""
        return Entry(
            prior=at_least_32_bits(self.to_prior(encoded.top)),
            hidden=self.entry_to_hidden(encoded.top),
            stem=self.entry_to_stem(encoded.top),
            skips=encoded.maps,
        )

    def query(self, x: Tensor) -> Query:
        """See `Networks.query`."""
        check_images("x", x, self.image_shape)
        top = self.pyramid(x.to(dtype_of(self)))
        return Query(key=at_least_32_bits(self.to_key(top)), hidden=self.to_hidden(top))

    def prior(self, m: Entry) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """See `Networks.prior`."""
        return gaussian(m.prior)

    def posterior(self, query: Query, m: Entry) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
        """See `Networks.posterior`."""
        return gaussian(self.hidden_to_posterior(F.relu(query.hidden + m.hidden)))

    def decode(self, z: Float[Tensor, "... Z"], m: Entry) -> Float[Tensor, "... C height width"]:
        """See `Networks.decode`."""
        logits = at_least_32_bits(self.to_logits(F.relu(self.stem(z.to(dtype_of(self.stem))) + m.stem)))
        logits = logits.reshape(*logits.shape[:-1], *self.image_shape)
        for pixels in m.skips:
            logits = logits + self.log_copy.exp() * (2 * pixels - 1).movedim(-1, -3)
        return logits


def initialise(networks: nn.Module, *, outputs: Sequence[nn.Module]) -> None:
    """Keep the variance of activations through ReLU layers (He et al. 2015), and of layers without one.

    With torch's default the signal of x dies out on its way through q(z | x, m): z starts as pure noise, the
    decoder learns to ignore it, and KL(z) stays at zero for the first thousand updates.
    """
    for module in networks.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                # Each output pixel sees one in stride^2 taps.
                fan_in = module.weight[:, 0].numel() // module.stride[0] ** 2
            gain = 1.0 if module in outputs else 2.0
            nn.init.normal_(module.weight, std=math.sqrt(gain / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def gaussian(raw: Float[Tensor, "... loc_and_scale"]) -> tuple[Float[Tensor, "... Z"], Float[Tensor, "... Z"]]:
    """Location and positive scale, each [..., Z], from a layer's output [..., 2 Z]; scale 1 at 0."""
    loc, raw_scale = at_least_32_bits(raw).chunk(2, dim=-1)
    return loc, F.softplus(raw_scale + 0.5413) + MIN_SCALE  # softplus(0.5413) = 1


def check_images(name: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse a batch whose images have another shape than the networks were built for."""
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape:
        raise ValueError(
            f"{name}: expected shape [N, {', '.join(map(str, image_shape))}], got {list(images.shape)}"
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the parameters: what the module takes images and latents in."""
    return next(module.parameters()).dtype


def at_least_32_bits(values: Tensor) -> Tensor:
    """Likelihoods and cosines need them, whatever the precision of the layers; 64 bits stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
