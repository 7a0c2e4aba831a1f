"""What a likelihood is: a module from what the decoder gives to a distribution of images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.parts import Part
from vma_pyro.networks.interface import Distribution

__all__ = ["Distribution", "Likelihood"]


class Likelihood(Part):
    """p(x | z, m), a distribution of images, from what the decoder makes of z and m.

    This one is the base of the others, and takes all finite images.

    Attributes:
        channels: numbers per pixel and colour from the decoder. With C colours its first C channels are the logits
            of the mean of x, which a `Refinement` looks at.
        copies: whether it wants a decoder that is given the entry's pixels themselves, where that can be had.
    """

    channels: int = 1
    copies: bool = False

    def maps(self, colours: int) -> int:
        """Say how many maps F it takes beside them, per pixel of images with C colours."""
        return 0

    def forward(self, decoded: Float[Tensor, "*batch C height width"]) -> Distribution:
        """Return a distribution of images.

        Args:
            decoded: [..., B, channels * C + F, height, width], from the decoder.

        Returns:
            A distribution with batch shape [..., B] and event shape [C, height, width].
        """
        raise NotImplementedError(f"{type(self).__name__}.forward: expected a distribution of images, got none")

    def check(self, name: str, images: Tensor) -> None:
        """Refuse images or entries that this cannot score, [..., C, height, width]; called on a CPU only.

        Raises:
            ValueError: with the name, what is expected and what was given.
        """

    def warn(self, name: str, images: Tensor) -> None:
        """Name what it can score, but may be meant otherwise."""
