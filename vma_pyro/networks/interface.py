"""The interface between the networks and the two files that users edit, model.py and guide.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from pyro.distributions import TorchDistribution as Distribution
else:  # of which those of Pyro are; annotations with them cannot be checked at run time
    from torch.distributions import Distribution


@runtime_checkable
class Networks(Protocol):
    """What model and guide need of networks.

    `heads` may be left out where `encode` computes everything. Networks whose decoder gives more than one number
    per pixel and colour say how many in an attribute `channels`; likelihoods ask for it.
    """

    latent_dim: int
    key_dim: int
    image_shape: tuple[int, int, int]

    def encode(self, entries: Tensor) -> Any:
        """Features of memory entries [N, 1, 28, 28], a `key` [N, E] among them; once per entry and update."""

    def heads(self, features: Any) -> Any:
        """What `prior`, `posterior` and `decode` need of entries, from their features; see `Memory.read`."""

    def query(self, x: Tensor) -> Query:
        """Features of targets [B, 1, 28, 28]."""

    def prior(self, m: Any) -> Distribution:
        """p(z | m), with batch shape [...] and event shape [Z]."""

    def posterior(self, query: Query, m: Any) -> Distribution:
        """q(z | x, m), with batch shape [..., B] and event shape [Z]."""

    def decode(self, z: Float[Tensor, "... Z"], m: Any) -> Float[Tensor, "... C height width"]:
        """What the likelihood makes p(x | z, m) of, [..., B, channels * C, 28, 28], for z [..., B, Z].

        The first C channels are the logits of the mean.
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as of any torch module."""


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


class Features(NamedTuple):
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
        rows: which row of a table that does not change each was read from, int64 [...]; nothing in training.
    """

    prior: Float[Tensor, "... loc_and_scale"]
    hidden: Float[Tensor, "... H"]
    stem: Float[Tensor, "... D"]
    skips: tuple[Float[Tensor, "... height width C"], ...] = ()
    images: tuple[Float[Tensor, "... C height width"], ...] = ()
    rows: tuple[Int[Tensor, "..."], ...] = ()
