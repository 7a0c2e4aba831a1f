"""What convolutional networks and perceptrons share: all but the pyramid itself and the decoder."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.networks.interface import Distribution, Entry, Features, Query
from vma_pyro.networks.layers import at_least_32_bits, check_images, dtype_of, in_full_precision, initialise

MIN_SCALE = 1e-3  # keeps log q(z | x, m) finite when the posterior collapses on a point


class PyramidNetworks(Part):
    r"""Networks on a pyramid of layers with ReLU units at its top, t(x) of a target and t(m) of an entry.

    .. math:: e(x) = A\,t(x), \qquad p(z \mid m) = \mathcal N(\text{MLP}(t(m))), \qquad
              q(z \mid x, m) = \mathcal N(C\,\mathrm{ReLU}(B\,t(x) + B'\,t(m)))

    A subclass adds the decoder, and says how to climb the pyramid. Another family for z is another `prior` and
    `posterior`.

    Args:
        pyramid: any module; `climb` uses it.
        top: T, units at its top.
        latent_dim: Z, dimension of z.
        key_dim: E, dimension of the embeddings that q(a | x) compares.
        hidden_dim: H, width of the hidden layers of p(z | m) and q(z | x, m).
        image_shape: [C, height, width] of one image.
        channels: numbers per pixel and colour from the decoder; None for as many as the model's likelihood wants,
            which is 1 as long as there is none.
        maps: further maps F of the decoder, for a likelihood that looks at its pixels' neighbours; None likewise.

    Attributes:
        output_shape: [channels * C + maps, height, width] from the decoder.
        copies: whether the decoder is given the entry's pixels themselves.
    """

    def __init__(
        self,
        pyramid: nn.Module,
        *,
        top: int,
        latent_dim: int,
        key_dim: int,
        hidden_dim: int,
        image_shape: tuple[int, int, int],
        channels: int | None = None,
        maps: int | None = None,
    ) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"channels: expected at least 1 per pixel and colour, got {channels}")
        if maps is not None and maps < 0:
            raise ValueError(f"maps: expected a number of maps, or 0 for none, got {maps}")
        self.latent_dim, self.key_dim = latent_dim, key_dim
        self.image_shape: tuple[int, int, int] = (image_shape[0], image_shape[1], image_shape[2])
        self.channels, self.maps = channels or 1, maps or 0
        self.copies = False
        self.undecided = {"channels", "maps"} if channels is None and maps is None else set()
        self.pyramid = pyramid
        self.to_key = nn.Linear(top, key_dim)
        self.to_hidden = nn.Linear(top, hidden_dim)
        self.entry_to_hidden = nn.Linear(top, hidden_dim, bias=False)
        self.hidden_to_posterior = nn.Linear(hidden_dim, 2 * latent_dim)
        self.to_prior = nn.Sequential(nn.Linear(top, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * latent_dim))
        self.entry_to_stem = nn.Linear(top, top, bias=False)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """The shape of what `decode` gives of one z."""
        colours, height, width = self.image_shape
        return self.channels * colours + self.maps, height, width

    def decide(self, **wanted: Any) -> None:
        """Give the decoder what a likelihood wants of it and the constructor has left open, once.

        Args:
            wanted: `channels`, `maps` and `copies`.
        """
        if not self.undecided:
            return
        decided = {name: wanted[name] for name in sorted(self.undecided & wanted.keys())}
        if any(value != getattr(self, name) for name, value in decided.items()):
            vars(self).update(decided)
            before = set(self.modules())
            self.make_outputs()
            made = [module for module in self.modules() if module not in before]
            last = self._modules.get("to_logits")
            initialise(nn.ModuleList(made), outputs=made if last is None else list(last.modules()))
            like = self.to_key.weight
            self.to(like.device, like.dtype).to(memory_format=torch.channels_last)
        self.undecided = set()
        self.completed()

    def make_outputs(self) -> None:
        """Make the last layers of the decoder, anew; that of the pixels, which no ReLU follows, is `to_logits`."""
        raise NotImplementedError(f"{type(self).__name__}.make_outputs: expected layers, got none")

    def climb(self, images: Tensor) -> tuple[tuple[Tensor, ...], Float[Tensor, "N T"]]:
        """Return maps of lower layers, channels last [N, height, width, C], and the top of the pyramid."""
        raise NotImplementedError(f"{type(self).__name__}.climb: expected maps and the top, got none")

    def decode(self, z: Float[Tensor, "... Z"], m: Entry) -> Float[Tensor, "... C height width"]:
        """See `Networks.decode`."""
        raise NotImplementedError(f"{type(self).__name__}.decode: expected logits, got none")

    def skips(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Make of an entry's maps its shares in the decoder: the maps themselves."""
        return maps

    def wanted(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the images where q(z | x, m) looks at them again: nowhere."""
        return ()

    def encode(self, entries: Tensor) -> Features:
        """See `Networks.encode`."""
        check_images("images", entries, self.image_shape)
        entries = entries.to(dtype_of(self))
        maps, top = self.climb(entries)
        return Features(self.key(entries, top), top, maps, self.wanted(entries))

    def key(self, images: Tensor, top: Float[Tensor, "N T"]) -> Float[Tensor, "N E"]:
        """What q(a | x) compares, of images and what the pyramid makes of them."""
        return at_least_32_bits(in_full_precision(self.to_key, top))

    def heads(self, features: Features) -> Entry:
        """See `Networks.heads`."""
        return Entry(
            prior=at_least_32_bits(self.to_prior(features.top)),
            hidden=self.entry_to_hidden(features.top),
            stem=self.entry_to_stem(features.top),
            skips=self.skips(features.maps),
            images=features.images,
        )

    def query(self, x: Tensor) -> Query:
        """See `Networks.query`."""
        check_images("x", x, self.image_shape)
        x = x.to(dtype_of(self))
        _, top = self.climb(x)
        return Query(self.key(x, top), self.to_hidden(top), self.wanted(x))

    def prior(self, m: Entry) -> Distribution:
        """See `Networks.prior`."""
        return gaussian(m.prior)

    def posterior(self, query: Query, m: Entry) -> Distribution:
        """See `Networks.posterior`."""
        return gaussian(self.hidden_to_posterior(F.relu(query.hidden + m.hidden)))


def gaussian(raw: Float[Tensor, "... loc_and_scale"]) -> Distribution:
    """Make a diagonal Gaussian over z, batch shape [...] and event shape [Z], of a layer's output [..., 2 Z]."""
    return dist.Normal(*loc_and_scale(raw)).to_event(1)


def loc_and_scale(raw: Float[Tensor, "... loc_and_scale"]) -> tuple[Tensor, Tensor]:
    """Take location and positive scale, each [..., Z], from a layer's output [..., 2 Z]; scale 1 at 0."""
    loc, raw_scale = at_least_32_bits(raw).chunk(2, dim=-1)
    return loc, F.softplus(raw_scale + 0.5413) + MIN_SCALE  # softplus(0.5413) = 1
