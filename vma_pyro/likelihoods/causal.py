"""Images whose pixels see their neighbours: p(x | z, m) as a product over pixels in the order of drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.noise import own_noise
from vma_pyro.likelihoods.interface import Distribution, Likelihood
from vma_pyro.likelihoods.logistics import DiscretizedLogistics
from vma_pyro.likelihoods.neighbourhood import Neighbourhood
from vma_pyro.likelihoods.pixels import BernoulliPixels

MEAN_OF = 64  # draws behind E[x | z, m], at most


class Causal(Likelihood):
    r"""A likelihood whose numbers for a pixel also depend on the pixels above it and to its left.

    .. math:: p(x \mid z, m) = \prod_i p(x_i \mid x_{near(i)}, z, m), \qquad
              p(x_i \mid x_{near(i)}, z, m) = \text{pixels}(d_i(z, m) + c_i(x_{near(i)}, z, m))

    What :math:`d` alone says is the likelihood `pixels`; :math:`c` comes from a `Neighbourhood`, and is zero at
    the start. So a trained model goes on from where it was.

    # Departs from the paper: its pixels are independent given z and m, so that a stroke is as blurred as the place
    of it is unsure. A neighbourhood makes strokes sharp, and leaves the whole, which it cannot see, to z and m.

    Args:
        pixels: the likelihood of pixels that are independent given what the decoder says.
        colours: C of the images.
        radius: rows above and columns beside it that a pixel sees.
        hidden: maps of the neighbourhood.
        layers: residual layers after it.
        steps: what a pixel knows is passed on by so many pixels, once for each number; see `Neighbourhood`.
        alone: weight, in training, of what `pixels` alone says of an image, so that z and m cannot leave
            everything to the neighbourhood: log p is then (1 - alone) of the log probability above, and `alone`
            of the one without c. In evaluation it has no effect.

    Raises:
        ValueError: a size below 1, a weight outside [0, 1), or `pixels` that see their neighbours themselves.
    """

    def __init__(
        self,
        pixels: Likelihood,
        *,
        colours: int = 1,
        radius: int = 4,
        hidden: int = 48,
        layers: int = 2,
        steps: Sequence[int] = (),
        alone: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= alone < 1:
            raise ValueError(f"alone: expected a weight from 0 to below 1, got {alone}")
        if not isinstance(pixels, Likelihood) or isinstance(pixels, Causal):
            raise ValueError(
                "pixels: expected a Likelihood of pixels that are independent given what the decoder says, got "
                f"{pixels.__name__ if isinstance(pixels, type) else type(pixels).__name__}"
            )
        self.pixels, self.colours, self.alone = pixels, colours, alone
        self.channels, self.copies = pixels.channels, pixels.copies
        numbers = pixels.channels * colours + pixels.maps(colours)
        sizes: dict[str, Any] = {"radius": radius, "hidden": hidden, "layers": layers, "steps": steps}
        self.neighbourhood = Neighbourhood(numbers, colours=colours, **sizes)

    def maps(self, colours: int) -> int:
        """See `Likelihood.maps`."""
        if colours != self.colours:
            raise ValueError(
                f"likelihood: expected {type(self).__name__}(colours={colours}) for images of {colours} colours, "
                f"got colours={self.colours}"
            )
        return self.pixels.maps(colours) + self.neighbourhood.hidden

    def forward(self, decoded: Float[Tensor, "*batch C height width"]) -> Distribution:
        """See `Likelihood.forward`."""
        expected = self.channels * self.colours + self.maps(self.colours)
        if decoded.shape[-3] != expected:
            raise ValueError(
                f"decoded: expected {expected} channels for {type(self).__name__}, {self.neighbourhood.hidden} "
                f"maps among them, got {decoded.shape[-3]}"
            )
        alone = self.alone if self.training else 0.0
        return CausalImages(self.pixels, self.neighbourhood, decoded, colours=self.colours, alone=alone)

    def check(self, name: str, images: Tensor) -> None:
        """Refuse what `pixels` refuses."""
        self.pixels.check(name, images)

    def warn(self, name: str, images: Tensor) -> None:
        """Name what `pixels` names."""
        self.pixels.warn(name, images)


class CausalBernoulli(Causal):
    r"""Binary pixels, each of which sees its neighbourhood above and to the left.

    .. math:: p(x \mid z, m) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(d_i(z, m) + c_i(x_{near(i)}, z, m)))

    Args:
        colours, radius, hidden, layers, steps, alone: see `Causal`.
    """

    def __init__(
        self,
        *,
        colours: int = 1,
        radius: int = 4,
        hidden: int = 48,
        layers: int = 2,
        steps: Sequence[int] = (),
        alone: float = 0.0,
    ) -> None:
        sizes: dict[str, Any] = {"radius": radius, "hidden": hidden, "layers": layers, "steps": steps}
        super().__init__(BernoulliPixels(), colours=colours, alone=alone, **sizes)


class CausalLogistics(Causal):
    """8-bit images, whose pixels see their neighbourhood above and to the left; see `DiscretizedLogistics`.

    Args:
        mixtures, levels: see `DiscretizedLogistics`.
        colours, radius, hidden, layers, steps, alone: see `Causal`.
    """

    def __init__(
        self,
        mixtures: int = 5,
        *,
        levels: int = 256,
        colours: int = 1,
        radius: int = 4,
        hidden: int = 48,
        layers: int = 2,
        steps: Sequence[int] = (),
        alone: float = 0.0,
    ) -> None:
        sizes: dict[str, Any] = {"radius": radius, "hidden": hidden, "layers": layers, "steps": steps}
        super().__init__(DiscretizedLogistics(mixtures, levels=levels), colours=colours, alone=alone, **sizes)


class CausalImages(dist.TorchDistribution):
    """The distribution of images that `Causal` gives: batch shape [..., B] and event shape [C, height, width].

    Args:
        pixels, neighbourhood: of the likelihood.
        decoded: [..., B, numbers + hidden, height, width], from the decoder.
        colours: C.
        alone: weight of what the pixels alone say.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        pixels: Likelihood,
        neighbourhood: Neighbourhood,
        decoded: Tensor,
        *,
        colours: int,
        alone: float = 0.0,
    ) -> None:
        self.pixels, self.neighbourhood, self.decoded = pixels, neighbourhood, decoded
        self.colours, self.alone = colours, alone
        self.kind = type(pixels).__name__
        super().__init__(decoded.shape[:-3], torch.Size((colours, *decoded.shape[-2:])), validate_args=False)

    @property
    def support(self) -> Any:
        """That of the pixels."""
        return self.pixels(self._numbers).support

    @property
    def _numbers(self) -> Tensor:
        return self.decoded[..., : -self.neighbourhood.hidden, :, :]

    @property
    def _maps(self) -> Tensor:
        return self.decoded[..., -self.neighbourhood.hidden :, :, :]

    def expand(self, batch_shape: Any, _instance: Any = None) -> CausalImages:
        """The same for more images, without a copy."""
        decoded = self.decoded.expand(*batch_shape, *self.decoded.shape[-3:])
        return CausalImages(self.pixels, self.neighbourhood, decoded, colours=self.colours, alone=self.alone)

    def log_prob(self, value: Float[Tensor, "*images C height width"]) -> Float[Tensor, "*batch"]:
        """Log probability of images, whose neighbourhoods are looked at once for all particles."""
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"x: expected images {list(self.event_shape)}, got values of shape {list(value.shape)}"
            )
        seen = self.neighbourhood(once(value), self._maps)
        scored: Tensor = self.pixels(self._numbers + seen).log_prob(value)
        if self.alone:
            scored = torch.lerp(scored, self.pixels(self._numbers).log_prob(value), self.alone)
        return scored

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw images [*sample_shape, *batch, C, height, width] pixel by pixel, row by row."""
        shape = torch.Size(sample_shape) + self.batch_shape
        numbers, maps = (
            t.expand(*shape, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (self._numbers, self._maps)
        )
        height, width = self.event_shape[1:]
        numbers = numbers.permute(2, 3, 0, 1).contiguous()  # [height, width, N, P]
        maps = maps.permute(2, 3, 0, 1).contiguous()
        drawing = self.neighbourhood.drawing(maps.shape[2], (self.colours, height, width), numbers)
        for i in range(height):
            for j in range(width):
                seen = drawing.numbers(i, j, maps[i, j])
                pixel = self.pixels((numbers[i, j] + seen)[..., None, None])
                drawing.draw(i, j, pixel.sample()[..., 0, 0])
        return drawing.images.reshape(*shape, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """E x, the mean of up to 64 draws that are the same at every call: there is no formula for it.

        Of larger images fewer, at least 4, as each takes its time; the standard error is at most 0.06 for 64.
        """
        number = max(4, min(MEAN_OF, MEAN_OF * 28 * 28 // self.event_shape.numel()))
        with own_noise(seed=0):
            return self.sample((number,)).mean(0)


def once(value: Tensor) -> Tensor:
    """Leave out the copies that an expanded tensor of images is of each of them: 1 where they broadcast."""
    for dim in range(value.dim() - 3):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value
