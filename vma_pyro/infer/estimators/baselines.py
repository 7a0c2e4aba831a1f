r"""Score baselines c_k: pure functions of the log weights [K, B].

The score part of the gradient of L = log 1/K sum_k w_k is E sum_k (L - c_k) grad log q(a_k), with log q(a_k)
also differentiated inside w_k. It is unbiased for every c_k that does not depend on particle k. Below,
S_-k = sum of w_l over l != k.

A baseline is a function from log weights [K, B] to c [K, B] that for each k ignores particle k;
`score_baseline` declares the least K, and whether the gradient is unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

ScoreBaseline = Callable[..., Tensor]
_F = TypeVar("_F", bound=ScoreBaseline)


def score_baseline(*, min_particles: int = 2, unbiased: bool = True) -> Callable[[_F], _F]:
    """Declare what a baseline needs; `MultiSampleELBO` refuses fewer particles and names the baseline."""

    def mark(function: _F) -> _F:
        function.min_particles = min_particles  # type: ignore[attr-defined]
        function.unbiased = unbiased  # type: ignore[attr-defined]
        return function

    return mark


def baseline_name(baseline: Any) -> str:
    """Name a baseline, for errors and tables."""
    return getattr(baseline, "__name__", None) or type(baseline).__name__


@score_baseline(min_particles=1)
def reinforce(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Take c_k = 0, no baseline at all: the noisiest case (Williams 1992)."""
    return torch.zeros_like(log_weights)


@score_baseline()
def vimco(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""Take c_k = log 1/(K-1) S_-k, the arithmetic mean of the others (Mnih & Rezende 2016, section 3.2)."""
    return leave_one_out_logsumexp(log_weights) - math.log(len(log_weights) - 1)


@score_baseline()
def vimco_geometric(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""Take c_k = log 1/K [S_-k + g_k], with g_k the geometric mean of the others (Mnih & Rezende 2016, eq. 9-10).

    The form that the VIMCO paper prefers; at K = 2 it is `vimco`.
    """
    geometric_mean = leave_one_out_sum(log_weights) / (len(log_weights) - 1)
    total = torch.logaddexp(leave_one_out_logsumexp(log_weights), geometric_mean)
    return total - math.log(len(log_weights))


@score_baseline()
def loo(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    r"""Take c_k = log 1/K S_-k, the bound without particle k (Lievin et al. 2020, OVIS at gamma = 0).

    The coefficient less the derivative inside w_k is -log(1 - v_k) - v_k >= 0, with v_k the normalised weight:
    near the posterior its signal-to-noise ratio grows like sqrt(K), where that of `vimco` falls.
    """
    return leave_one_out_logsumexp(log_weights) - math.log(len(log_weights))


@dataclass(frozen=True)
class OVIS:
    r"""c_k = log 1/(K-1) S_-k - gamma v_k + (1 - gamma) log(1 - 1/K) (Lievin et al. 2020, section 4.2).

    Gamma = 0 is `loo`, and unbiased. Gamma > 0 depends on particle k and is biased; with gamma = 1 the coefficient
    near the posterior is that of wake-phi. It helps where the effective sample size is low.

    Args:
        gamma: from 0 to 1.
    """

    gamma: float = 1.0
    min_particles = 2

    def __post_init__(self) -> None:
        """Refuse a gamma outside the range."""
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: expected 0 <= gamma <= 1, got {self.gamma}")

    @property
    def unbiased(self) -> bool:
        """Whether the gradient is unbiased: only at gamma = 0."""
        return self.gamma == 0

    def __call__(self, log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
        """Compute the baseline c [K, B]."""
        v = torch.nan_to_num(log_weights.softmax(0), nan=0.0)
        return vimco(log_weights) - self.gamma * v + (1 - self.gamma) * math.log(1 - 1 / len(log_weights))


@dataclass(frozen=True)
class OVISMonteCarlo:
    r"""c_k = 1/S sum_s log 1/K [S_-k + w'_s]: fresh particles w' take the place of particle k (Lievin et al.
    2020).

    It estimates E[L | the other particles], at S more runs of the model per update.

    Args:
        samples: S.
    """

    samples: int = 1
    min_particles = 2
    unbiased = True

    def __post_init__(self) -> None:
        """Refuse to draw no sample."""
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")

    @property
    def fresh_particles(self) -> int:
        """The number of particles that are drawn for the baseline alone."""
        return self.samples

    def __call__(self, log_weights: Float[Tensor, "K B"], fresh: Float[Tensor, "S B"]) -> Float[Tensor, "K B"]:
        """Compute the baseline c [K, B], from the log weights of the particles and of the fresh ones."""
        others = leave_one_out_logsumexp(log_weights)
        return torch.logaddexp(others, fresh[:, None]).mean(0) - math.log(len(log_weights))


def leave_one_out_logsumexp(log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Compute log S_-k for every k, [K, B] to [K, B]; weights of -inf are allowed.

    It adds the particles before and after k, as log(exp(total) - w_k) would be the logarithm of zero or less in
    float32 once one particle leads by 17 nats.
    """
    return torch.logaddexp(
        _shifted(log_weights, torch.logcumsumexp, -math.inf),
        _shifted(log_weights.flip(0), torch.logcumsumexp, -math.inf).flip(0),
    )


def leave_one_out_sum(values: Float[Tensor, " K *B"]) -> Float[Tensor, " K *B"]:
    """Sum over l != k for every k, [K, *B] to [K, *B], without subtraction, so that an -inf elsewhere survives."""
    return _shifted(values, torch.cumsum, 0.0) + _shifted(values.flip(0), torch.cumsum, 0.0).flip(0)


def _shifted(
    values: Float[Tensor, " K *B"], cumulate: Callable[..., Tensor], empty: float
) -> Float[Tensor, " K *B"]:
    """Cumulate the particles strictly before k; `empty` at k = 0."""
    first = torch.full_like(values[:1], empty)
    return torch.cat([first, cumulate(values[:-1], dim=0)])
