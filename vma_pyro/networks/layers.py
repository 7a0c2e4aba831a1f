"""Initial weights, checks of shapes, and the types of numbers that go in and come out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def initialise(networks: nn.Module, *, outputs: Sequence[nn.Module]) -> None:
    """Keep the variance of activations through ReLU layers (He et al. 2015), and of layers without one.

    With torch's default the signal of x dies out on its way through q(z | x, m): z starts as pure noise, the
    decoder learns to ignore it, and KL(z) stays at zero for the first thousand updates.

    Args:
        networks: whose linear and convolutional layers are initialised.
        outputs: those that no ReLU follows.
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


def check_images(name: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse a batch whose images have another shape than the networks were built for."""
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape:
        raise ValueError(
            f"{name}: expected shape [N, {', '.join(map(str, image_shape))}], got {list(images.shape)}"
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of the parameters: what the module takes images and latents in."""
    return next(module.parameters()).dtype


def at_least_32_bits(values: Tensor) -> Tensor:
    """Give likelihoods and cosines the precision they need, whatever that of the layers; 64 bits stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
