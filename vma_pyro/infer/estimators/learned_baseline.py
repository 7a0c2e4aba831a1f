"""Learned score baselines, which have parameters and a state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LearnedBaseline(nn.Module, ABC):
    """A score baseline that sees the program's arguments; it is trained along with model and guide.

    It learns to predict the bound, in mean square: `elbo(model, guide).parameters()` has its parameters. One that
    a guide's site asks for with `infer={"estimator": ...}` must be a submodule of the guide.
    """

    min_particles = 1
    unbiased = True

    @abstractmethod
    def forward(self, log_weights: Float[Tensor, "K B"], *args: Any, **kwargs: Any) -> Float[Tensor, "K B"]:
        """Compute the baseline c [K, B] from log weights without gradient and the arguments of the programs."""


class NVIL(LearnedBaseline):
    r"""c = mean + deviation * C(x): the running mean of the bound, and what a network adds for each datapoint.

    (Mnih & Gregor 2014, section 2.3.) The running mean and deviation are those before this draw, so that c
    depends on no particle of it. The paper also divides the learning signal by the deviation, which would change
    the expected gradient's direction; here it scales the network's output instead.

    Args:
        network: C, a module from the program's arguments to [*batch] or [*batch, 1]; None: the running mean alone.
        decay: the decay of the running mean and variance, which move in training mode only.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, network: nn.Module | None = None, *, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {decay}")
        self.network, self.decay = network, decay
        self.register_buffer("mean", torch.tensor(math.nan))
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, log_weights: Float[Tensor, "K B"], *args: Any, **kwargs: Any) -> Float[Tensor, "K B"]:
        """Compute the baseline c [K, B], the same for every particle."""
        bound = log_weights.logsumexp(0) - math.log(len(log_weights))
        mean = torch.nan_to_num(self.mean, nan=0.0).to(bound.dtype)
        c = mean.expand_as(bound)
        if self.network is not None:
            with torch.enable_grad():
                predicted = self.network(*args, **kwargs)
            c = mean + self.variance.sqrt().to(bound.dtype) * predicted.reshape(bound.shape)
        if self.training:
            self._remember(bound[bound.isfinite()])
        return c.expand_as(log_weights)

    @torch.no_grad()
    def _remember(self, bound: Tensor) -> None:
        if not len(bound):
            return
        if bool(self.mean.isnan()):
            self.mean.copy_(bound.mean())
        self.variance.lerp_(((bound - self.mean) ** 2).mean().to(self.variance.dtype), 1 - self.decay)
        self.mean.lerp_(bound.mean().to(self.mean.dtype), 1 - self.decay)
