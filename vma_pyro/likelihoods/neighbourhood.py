"""What a pixel sees of its own image: the pixels above it, and those to its left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro._system.whole import check_whole
from vma_pyro.networks.layers import OutputMaps


class Neighbourhood(Part):
    r"""Numbers for each pixel i from the neighbourhood :math:`x_{near(i)}`, and from the decoder's maps.

    .. math:: h_i = \mathrm{ReLU}(A\,x_{near(i)} + f_i), \qquad
              h_i \leftarrow h_i + E\,\mathrm{ReLU}(D\,h_{before(i)}), \qquad
              h_i \leftarrow h_i + \mathrm{ReLU}(B\,h_i), \qquad c_i = C\,h_i

    near(i) are the 2 r (r + 1) pixels before i in the order of drawing, row by row, that are at most r rows above
    and r columns beside it. (With r = 4 that is 40 pixels.) A x, which costs most, is computed once per image,
    however many particles there are; and c starts at zero. before(i) are i itself, the pixel on its left, and the
    three above these and to their right: what a pixel knows is passed on, by as many pixels as there are steps, in
    the manner of a PixelCNN (van den Oord et al. 2016).

    Args:
        outputs: numbers c for each pixel.
        colours: C of the images.
        radius: r.
        hidden: width of h, and the number of maps f.
        layers: matrices B, one after the other.
        steps: how far apart the pixels are of each pair of matrices D and E, one pair after the other.
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(
        self,
        outputs: int,
        *,
        colours: int,
        radius: int,
        hidden: int,
        layers: int,
        steps: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, size in {"colours": colours, "radius": radius, "hidden": hidden}.items():
            check_whole(name, size)
        check_whole("layers", layers, least=0)
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise ValueError(f"steps: expected numbers of pixels, one for each pass, got {steps!r}")
        for step in steps:
            check_whole("steps", step)
        self.radius, self.hidden = radius, hidden
        seen = 2 * radius * (radius + 1)
        self.near = nn.Parameter(torch.randn(hidden, colours, seen) * (2 / (seen * colours)) ** 0.5)
        residual = [nn.Linear(hidden, hidden) for _ in range(layers)]
        self.passes = nn.ModuleList(Pass(hidden, step) for step in steps)
        self.layers = nn.ModuleList(residual)
        self.to_outputs = nn.Linear(hidden, outputs)
        for layer in residual:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.to_outputs.weight)
        nn.init.zeros_(self.to_outputs.bias)

    def forward(
        self, x: Float[Tensor, "*images C height width"], maps: Float[Tensor, "*batch F height width"]
    ) -> Float[Tensor, "*batch P height width"]:
        """Return c for all pixels at once; the images broadcast against the maps, or the other way round."""
        r, images = self.radius, x.reshape(-1, *x.shape[-3:])
        kernel = F.pad(self.near, (0, r + 1)).unflatten(-1, (r + 1, 2 * r + 1))  # none at i and to its right
        seen = F.conv2d(F.pad(images.to(kernel.dtype), (r, r, r, 0)), kernel)
        seen = seen.reshape(*x.shape[:-3], *seen.shape[1:])
        h = F.relu(seen + maps.to(seen.dtype))
        if self.passes:
            batch, h = h.shape[:-3], h.reshape(-1, *h.shape[-3:]).contiguous(memory_format=torch.channels_last)
            for passed in self.passes:
                h = passed(h)
            h = h.reshape(*batch, *h.shape[1:])
        return self._numbers(h.movedim(-3, -1)).movedim(-1, -3)

    def drawing(self, number: int, image_shape: tuple[int, int, int], like: Tensor) -> Drawing:
        """Begin to draw images pixel by pixel."""
        return Drawing(self, number, image_shape, like)

    def _numbers(self, h: Tensor) -> Tensor:
        """c from h, which is the last dimension."""
        for layer in self.layers:
            h = h + F.relu(layer(h))
        out: Tensor = self.to_outputs(h)
        return out.to(torch.promote_types(out.dtype, torch.float32))


class Pass(nn.Module):
    r"""What pixels know, passed on: :math:`h_i + E\,\mathrm{ReLU}(D\,h_{before(i)})`; E starts at zero.

    Args:
        hidden: width of h.
        step: how many pixels apart those of before(i) are.
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(self, hidden: int, step: int) -> None:
        super().__init__()
        self.step = step
        self.before = nn.Conv2d(hidden, hidden, (2, 3), dilation=step)
        self.outer = OutputMaps(hidden, hidden, 1)
        nn.init.normal_(self.before.weight, std=(2 / (5 * hidden)) ** 0.5)
        if self.before.bias is not None:
            nn.init.zeros_(self.before.bias)
        nn.init.zeros_(self.before.weight[:, :, 1, 2])  # to the right of i: nothing is known there

    def forward(self, h: Float[Tensor, "N hidden height width"]) -> Float[Tensor, "N hidden height width"]:
        """Pass on what all pixels know at once."""
        d = self.step
        seen = F.conv2d(F.pad(h, (d, d, d, 0)), self.kernel(), self.before.bias, dilation=d)
        out: Tensor = h + self.outer(F.relu_(seen))
        return out

    def kernel(self) -> Tensor:
        """The weights of D, without that of the pixel to the right of i."""
        return self.before.weight * self.before.weight.new_tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])

    def at(
        self, row: int, column: int, known: Float[Tensor, "rows columns N hidden"]
    ) -> Float[Tensor, "N hidden"]:
        """The same of one pixel, of what those before it and itself know, with margins as `Drawing` has them."""
        d, weight = self.step, self.before.weight
        taps = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        near = torch.cat([known[row + d * i, column + d * j] for i, j in taps], -1)
        matrix = torch.cat([weight[:, :, i, j] for i, j in taps], -1)
        seen = F.relu(F.linear(near, matrix, self.before.bias))
        return known[row + d, column + d] + F.linear(seen, self.outer.weight[:, :, 0, 0], self.outer.bias)


class Drawing:
    """Images that are drawn pixel by pixel, row by row, and what their pixels know so far.

    Args:
        neighbourhood: of the likelihood.
        number: N of images.
        image_shape: [C, height, width].
        like: a tensor of their type and device.
    """

    def __init__(
        self, neighbourhood: Neighbourhood, number: int, image_shape: tuple[int, int, int], like: Tensor
    ) -> None:
        self.neighbourhood = neighbourhood
        colours, height, width = image_shape
        r, hidden = neighbourhood.radius, neighbourhood.hidden
        self.width = width
        self.passes: list[Any] = list(neighbourhood.passes)
        # With as many rows above and columns on both sides as pixels look beyond the edge.
        self.canvas = like.new_zeros(number, colours, height + r, width + 2 * r)
        self.known = [
            neighbourhood.near.new_zeros(height + p.step, width + 2 * p.step, number, hidden) for p in self.passes
        ]

    def numbers(self, row: int, column: int, maps: Float[Tensor, "N F"]) -> Float[Tensor, "N P"]:
        """Return c of one pixel, which no one has asked for before, after those before it.

        Args:
            row, column: of the pixel.
            maps: of the decoder at this pixel.
        """
        near, r = self.neighbourhood, self.neighbourhood.radius
        above = self.canvas[:, :, row : row + r, column : column + 2 * r + 1].flatten(2)
        left = self.canvas[:, :, row + r, column : column + r]
        pixels = torch.cat([above, left], -1).flatten(1).to(near.near.dtype)
        h = F.relu(pixels @ near.near.flatten(1).T + maps.to(near.near.dtype))
        for passed, known in zip(self.passes, self.known, strict=True):
            known[row + passed.step, column + passed.step] = h
            h = passed.at(row, column, known)
        return near._numbers(h)

    def draw(self, row: int, column: int, pixel: Float[Tensor, "N C"]) -> None:
        """Put a pixel in its place."""
        r = self.neighbourhood.radius
        self.canvas[:, :, row + r, column + r] = pixel

    @property
    def images(self) -> Float[Tensor, "N C height width"]:
        """What is drawn."""
        r = self.neighbourhood.radius
        return self.canvas[:, :, r:, r : r + self.width]
