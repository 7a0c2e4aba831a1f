"""Initial weights, checks of shapes, and the types of numbers that go in and come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvTranspose2d(nn.ConvTranspose2d):
    """Torch's layer, with the gradient of its bias by a sum: torch's takes longer than all the rest on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's."""
        if self.bias is None or output_size is not None:
            return super().forward(input, output_size)
        added = F.conv_transpose2d(
            input,
            self.weight,
            self.bias.detach(),
            self.stride,
            self.padding,  # type: ignore[arg-type]  # numbers, as transposed layers have no other
            self.output_padding,
            self.groups,
            self.dilation,
        )
        out: Tensor = _AddedBias.apply(added, self.bias)
        return out


class _AddedBias(torch.autograd.Function):
    """Maps [N, C, height, width], to which a bias [C] has been added, and its gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(maps)  # returned as they are
        ctx.dtype = bias.dtype
        return maps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, bias = ctx.needs_input_grad
        return gradient if maps else None, gradient.sum((0, 2, 3)).to(ctx.dtype) if bias else None


class ZeroAtStart(nn.Module):
    """A layer that gives zero at the start; before the kind of layer among the bases."""

    starts_silent = True  # trained weights without it may be trained on with it

    def reset_parameters(self) -> None:
        """Start at zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class OutputMaps(ZeroAtStart, nn.Conv2d):
    """What a likelihood wants of the decoder's last map beside the logits of the mean; zero at the start."""


class OutputLayer(ZeroAtStart, nn.Linear):
    """A layer of units that gives zero at the start."""


class ResidualBlock(nn.Module):
    r"""A correction of maps by two 3x3 convolutions, the second of which starts at zero.

    .. math:: h \leftarrow h + B\,\mathrm{ReLU}(A\,h)
    """

    starts_silent = True  # trained weights without it may be trained on with it

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(maps, maps, 3, padding=1)
        self.outer = OutputMaps(maps, maps, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """Correct maps [N, C, height, width]."""
        corrected: Tensor = h + self.outer(F.relu_(self.inner(h)))
        return corrected


def initialise(networks: nn.Module, *, outputs: Sequence[nn.Module]) -> None:
    """Keep the variance of activations through ReLU layers (He et al. 2015), and of layers without one.

    With torch's default the signal of x dies out on its way through q(z | x, m): z starts as pure noise, the
    decoder learns to ignore it, and KL(z) stays at zero for the first thousand updates.

    Args:
        networks: whose linear and convolutional layers are initialised.
        outputs: those that no ReLU follows.
    """
    for module in networks.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, OutputMaps):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                # Each output pixel sees one in stride^2 taps.
                fan_in = module.weight[:, 0].numel() // module.stride[0] ** 2
            gain = 1.0 if module in outputs else 2.0
            nn.init.normal_(module.weight, std=math.sqrt(gain / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_images(name: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse a batch whose images have another shape than the networks were built for."""
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape:
        raise ValueError(
            f"{name}: expected shape [N, {', '.join(map(str, image_shape))}], got {list(images.shape)}"
        )


def in_full_precision(layer: nn.Module, values: Tensor) -> Tensor:
    """Apply a layer in the type of its parameters under autocast, too."""
    with torch.autocast(values.device.type, enabled=False):
        out: Tensor = layer(values.to(dtype_of(layer)))
        return out


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of the parameters: what the module takes images and latents in."""
    return next(module.parameters()).dtype


def at_least_32_bits(values: Tensor) -> Tensor:
    """Give likelihoods and cosines the precision they need, whatever that of the layers; 64 bits stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
