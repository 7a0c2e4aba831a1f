r"""Score baselines c_k: pure functions of the log weights [K, B].

The score part of the gradient of L = log 1/K sum_k w_k is E sum_k (L - c_k) grad log q(a_k), with log q(a_k)
also differentiated inside w_k. It is unbiased for every c_k that does not depend on particle k. Below,
S_-k = sum of w_l over l != k.

A baseline is a function from log weights [K, B] to c [K, B]; `needs_particles` declares the least K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

ScoreBaseline = Callable[[Tensor], Tensor]
_F = TypeVar("_F", bound=ScoreBaseline)


def needs_particles(least: int) -> Callable[[_F], _F]:
    """Declare the least K of a baseline; `MultiSampleELBO` refuses fewer by the baseline's name."""

    def mark(function: _F) -> _F:
        function.min_particles = least  # type: ignore[attr-defined]
        return function

    return mark


@needs_particles(1)
def reinforce(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """c_k = 0: no baseline, the reference for how noisy it gets (Williams 1992)."""
    return torch.zeros_like(log_weights)


@needs_particles(2)
def vimco(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""c_k = log 1/(K-1) S_-k, the arithmetic mean of the others (Mnih & Rezende 2016, section 3.2)."""
    return leave_one_out_logsumexp(log_weights) - math.log(len(log_weights) - 1)


@needs_particles(2)
def vimco_geometric(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""c_k = log 1/K [S_-k + g_k], with g_k the geometric mean of the others (Mnih & Rezende 2016, eq. 9-10).

    The form that the VIMCO paper prefers; at K = 2 it is `vimco`.
    """
    geometric_mean = leave_one_out_sum(log_weights) / (len(log_weights) - 1)
    total = torch.logaddexp(leave_one_out_logsumexp(log_weights), geometric_mean)
    return total - math.log(len(log_weights))


@needs_particles(2)
def loo(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""c_k = log 1/K S_-k: leave particle k out of the bound (Lievin et al. 2020, OVIS at gamma = 0).

    The coefficient less the derivative inside w_k is -log(1 - v_k) - v_k >= 0, with v_k the normalised weight:
    near the posterior its signal-to-noise ratio grows like sqrt(K), where that of `vimco` falls.
    """
    return leave_one_out_logsumexp(log_weights) - math.log(len(log_weights))


def leave_one_out_logsumexp(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """log S_-k for every k, [K, B] to [K, B].

    From the particles before and after k, not as log(exp(total) - w_k): in float32 that difference is zero or
    negative as soon as one particle leads by 17 nats. Weights of -inf are allowed.
    """
    return torch.logaddexp(
        _shifted(log_weights, torch.logcumsumexp, -math.inf),
        _shifted(log_weights.flip(0), torch.logcumsumexp, -math.inf).flip(0),
    )


def leave_one_out_sum(values: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Sum over l != k for every k, [K, B] to [K, B], without subtraction: -inf elsewhere than at k survives."""
    return _shifted(values, torch.cumsum, 0.0) + _shifted(values.flip(0), torch.cumsum, 0.0).flip(0)


def _shifted(values: Float[Tensor, "K B"], cumulate: Callable[..., Tensor], empty: float) -> Float[Tensor, "K B"]:
    """The cumulative value of the particles strictly before k, `empty` at k = 0."""
    first = torch.full_like(values[:1], empty)
    return torch.cat([first, cumulate(values[:-1], dim=0)])
