"""What a pixel sees of its own image: the pixels above it, and those to its left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro._system.whole import check_whole


class Neighbourhood(Part):
    r"""Numbers for each pixel i from the neighbourhood :math:`x_{near(i)}`, and from the decoder's maps.

    .. math:: h_i = \mathrm{ReLU}(A\,x_{near(i)} + f_i), \qquad h_i \leftarrow h_i + \mathrm{ReLU}(B\,h_i), \qquad
              c_i = C\,h_i

    near(i) are the 2 r (r + 1) pixels before i in the order of drawing, row by row, that are at most r rows above
    and r columns beside it. (With r = 4 that is 40 pixels.) A x, which costs most, is computed once per image,
    however many particles there are; and c starts at zero.

    Args:
        outputs: numbers c for each pixel.
        colours: C of the images.
        radius: r.
        hidden: width of h, and the number of maps f.
        layers: matrices B, one after the other.
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(self, outputs: int, *, colours: int, radius: int, hidden: int, layers: int) -> None:
        super().__init__()
        for name, size in {"colours": colours, "radius": radius, "hidden": hidden}.items():
            check_whole(name, size)
        check_whole("layers", layers, least=0)
        self.radius, self.hidden = radius, hidden
        seen = 2 * radius * (radius + 1)
        self.near = nn.Parameter(torch.randn(hidden, colours, seen) * (2 / (seen * colours)) ** 0.5)
        residual = [nn.Linear(hidden, hidden) for _ in range(layers)]
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
        return self._numbers(seen.movedim(-3, -1), maps.movedim(-3, -1)).movedim(-1, -3)

    def at(
        self, row: int, column: int, canvas: Float[Tensor, "N C rows columns"], maps: Float[Tensor, "N F"]
    ) -> Float[Tensor, "N P"]:
        """Return c of one pixel.

        Args:
            row, column: of the pixel.
            canvas: what is drawn so far, with `radius` more rows above and columns on both sides (`canvas_for`).
            maps: of the decoder at this pixel.
        """
        r = self.radius
        above = canvas[:, :, row : row + r, column : column + 2 * r + 1].flatten(2)
        left = canvas[:, :, row + r, column : column + r]
        near = torch.cat([above, left], -1).flatten(1).to(self.near.dtype)
        return self._numbers(near @ self.near.flatten(1).T, maps)

    def canvas_for(self, number: int, image_shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Make empty images with the margins that `at` wants."""
        colours, height, width = image_shape
        r = self.radius
        return like.new_zeros(number, colours, height + r, width + 2 * r)

    def _numbers(self, seen: Tensor, maps: Tensor) -> Tensor:
        """c from A x and f, of which the last dimension is that of h."""
        h = F.relu(seen + maps.to(seen.dtype))
        for layer in self.layers:
            h = h + F.relu(layer(h))
        out: Tensor = self.to_outputs(h)
        return out.to(torch.promote_types(out.dtype, torch.float32))
