"""Arithmetic of log weights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def log_mean_exp(log_weights: Float[Tensor, " K *B"]) -> Float[Tensor, "*B"]:
    """Compute log 1/K sum_k w_k, over the first dimension."""
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


def normalised(log_weights: Float[Tensor, " K *B"]) -> Float[Tensor, " K *B"]:
    """Compute v_k = w_k / sum_l w_l, without gradient; zero where all weigh nothing."""
    with torch.no_grad():
        return torch.nan_to_num(log_weights.softmax(0), nan=0.0)


def weighted(v: Float[Tensor, "K B"], log_weights: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Compute v_k log w_k; exactly nothing where v_k is zero, whatever the weight.

    With v the normalised weights its gradient is that of log mean w.
    """
    return v * torch.where(v == 0, 0.0, log_weights)


def finite(values: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Replace values that are not finite by 0, without a gradient: there the loss is infinite."""
    return torch.where(values.isfinite(), values, 0.0)


def effective_samples(log_weights: Float[Tensor, " K *B"]) -> Float[Tensor, "*B"]:
    """Compute (sum_k w_k)^2 / sum_k w_k^2 over the first dimension: how many even draws the K are worth."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
