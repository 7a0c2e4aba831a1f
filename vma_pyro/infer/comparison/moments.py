"""Running moments of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Moments:
    """Running mean and variance of gradients, and their parts along given directions."""

    def __init__(self, size: int, directions: Tensor | None) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        self.directions = directions  # [D, size], of length one; the first is the reference's
        self.along: list[Tensor] = []
        self.lengths: list[float] = []  # squared

    def add(self, g: Tensor) -> None:
        """Add one gradient."""
        self.count += 1
        difference = g - self.mean
        self.mean += difference / self.count
        self.squares += difference * (g - self.mean)
        if self.directions is not None:
            self.along.append(self.directions @ g)
            self.lengths.append(g.square().sum().item())

    def variance(self) -> float:
        """Compute the variance, summed over components."""
        return self.squares.sum().item() / (self.count - 1)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Compute the mean along each direction, and its squared standard error."""
        along = torch.stack(self.along)
        return along.mean(0), along.var(0) / self.count

    def relative_error(self) -> float:
        """Compute the standard error of the mean over its length; NaN where the mean is nothing."""
        length = self.mean.square().sum().item()
        return math.sqrt(self.variance() / self.count / length) if length > 0 else math.nan

    def is_zero(self) -> bool:
        """Tell whether all gradients were exactly zero: nothing here is trained."""
        return not self.mean.any() and not self.squares.any()

    def directional_snr(self, reference_error: float) -> float:
        """Compute sqrt(E g_par^2 / E g_perp^2), parts along and across the first direction.

        The two mean squares are each without bias; the mean of |g_par| / |g_perp| would be ruled by the few draws
        with hardly a part across. A sampled reference points a little aside, which puts part of the square along
        into the square across: to first order its squared relative error, which is taken out again.
        """
        if len(self.mean) < 2:
            return math.nan
        along = torch.stack(self.along)[:, 0].square().mean().item()
        across = sum(self.lengths) / self.count - along - along * reference_error**2
        if across <= 1e-12 * along:
            return math.inf
        return math.sqrt(along / across)
