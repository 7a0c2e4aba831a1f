r"""The evidence of AIR's small canvases, for each number of objects.

.. math::
    p(x) = \sum_n p(n) \int p(u_{1:n}) \, \mathcal N \Big( x; \sum_t g_0(u_t), \sigma_x^2 I + A A^\top \Big) \, du,
    \qquad A = [g_j(u_t)]_{t, j}

with g_j(u) part j of the decoder drawn at u: the decoder is linear in v, which is integrated in closed form.
Places are integrated by population Monte Carlo (Cappe et al. 2004): a first round draws them around those where
the canvas was made to have objects, or from the prior; every later one around draws that are resampled by the
weights of the round before. A share of the prior keeps the weights bounded where the likelihood is; those of
the last round, which are independent given the rounds before, are the estimate.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from .canvas import CENTRES, NOISE, PRESENT, SPREAD, STEPS, draw

ROUNDS, DRAWS = 3, 600  # draws of each round, for each canvas and number of objects
NARROW = 0.25  # width around a known place, in standard deviations of the prior
RESAMPLED = 64  # centres of later rounds
WIDTHS = (0.2, 0.4, 0.8)  # around those
PRIOR = 0.1  # its share in later rounds


class Evidence(NamedTuple):
    """log p(x, n) of each canvas and number of objects, and the standard error of log p(x), in nats."""

    log_joint: Float[Tensor, "B N"]
    error: Float[Tensor, " B"]


def evidence(
    parts: Float[Tensor, "J G G"],
    x: Float[Tensor, "B S S"],
    present: Float[Tensor, "B T"],
    where: Float[Tensor, "B T 2"],
) -> Evidence:
    """Compute the evidence under a decoder; `present` and `where` say around which places to look."""
    parts, numbers = parts.double(), range(1, STEPS + 1)
    log_none = Normal(0.0, NOISE).log_prob(x.double()).sum((1, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        canvases = [
            (row.flatten(), at[there.bool()]) for row, there, at in zip(x.double(), present, where, strict=True)
        ]
        log_w = torch.stack([torch.stack([weigh(parts, *canvas, n) for n in numbers]) for canvas in canvases])
    log_likelihoods = torch.cat([log_none[:, None], log_w.logsumexp(-1) - math.log(DRAWS)], 1)  # [B, 1 + T]
    log_prior = [n * math.log(PRESENT) + (n < STEPS) * math.log(1 - PRESENT) for n in range(STEPS + 1)]
    log_joint = log_likelihoods + torch.tensor(log_prior)
    relative = (log_w - log_likelihoods[:, 1:, None]).exp().std(-1) / DRAWS**0.5
    return Evidence(log_joint, (relative * log_joint.softmax(1)[:, 1:]).square().sum(1).sqrt())


def weigh(
    parts: Float[Tensor, "J G G"], x: Float[Tensor, " P"], known: Float[Tensor, "M 2"], number: int
) -> Float[Tensor, " S"]:
    """Draw log weights whose mean weight is p(x | number of objects), for places known to have some."""
    centres, spread = CENTRES[:number].double(), SPREAD.double()
    prior = Independent(Normal(centres, spread), 2)

    def log_joint(places: Float[Tensor, "S T 2"]) -> Float[Tensor, " S"]:
        drawn = sum_of_objects(draw(parts, places).flatten(-2))
        return prior.log_prob(places) + log_likelihood(drawn, x)

    # At first each object for itself is near one of the known places, or anywhere.
    places = torch.cat([known.double().expand(number, -1, 2), centres[:, None]], 1)  # [T, M + 1, 2]
    width = torch.cat([NARROW * torch.ones(len(known)), torch.ones(1)])[:, None] * spread
    even = Categorical(torch.ones(number, len(width)))
    proposal: Any = Independent(
        MixtureSameFamily(even, Independent(Normal(places, width.expand_as(places)), 1)), 1
    )
    widths = torch.tensor(WIDTHS).repeat_interleave(RESAMPLED)[:, None, None] * spread
    for _ in range(ROUNDS - 1):
        draws = proposal.sample((DRAWS,))
        v = (log_joint(draws) - proposal.log_prob(draws)).softmax(0)
        around = draws[v.multinomial(RESAMPLED, replacement=True)].repeat(len(WIDTHS), 1, 1)
        # The prior is one component more.
        loc, scale = (
            torch.cat([around, centres[None]]),
            torch.cat([widths.expand_as(around), spread.expand(1, number, 2)]),
        )
        share = torch.tensor([(1 - PRIOR) / len(around)] * len(around) + [PRIOR])
        proposal = MixtureSameFamily(Categorical(share), Independent(Normal(loc, scale), 2))
    draws = proposal.sample((DRAWS,))
    return log_joint(draws) - proposal.log_prob(draws)


def sum_of_objects(drawn: Float[Tensor, "N T J P"]) -> Float[Tensor, "N 1+T*(J-1) P"]:
    """Put g_0 of all objects together; every object has other factors."""
    return torch.cat([drawn[:, :, 0].sum(1, keepdim=True), drawn[:, :, 1:].flatten(1, 2)], 1)


def log_likelihood(drawn: Float[Tensor, "N D P"], x: Float[Tensor, " P"]) -> Float[Tensor, " N"]:
    r"""Compute log N(x; g, sigma^2 I + A A'), drawn = [g, A], by the matrix inversion lemma.

    .. math::
        -\tfrac12 \Big[ P \log 2 \pi \sigma^2 + \log \big| I + A^\top A / \sigma^2 \big|
        + \big( r^\top r - r^\top A (\sigma^2 I + A^\top A)^{-1} A^\top r \big) / \sigma^2 \Big], \quad r = x - g
    """
    r, A = x - drawn[:, 0], drawn[:, 1:]  # [N, P], [N, D - 1, P]
    gram = A @ A.mT
    b = (A @ r[..., None]).squeeze(-1)
    inner = NOISE**2 * torch.eye(gram.shape[-1]).to(gram) + gram
    root = torch.linalg.cholesky(inner)
    whitened = torch.linalg.solve_triangular(root, b[..., None], upper=False).squeeze(-1)
    log_determinant = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - gram.shape[-1] * math.log(NOISE**2)
    square = (r.square().sum(-1) - whitened.square().sum(-1)) / NOISE**2
    return -0.5 * (len(x) * math.log(2 * math.pi * NOISE**2) + log_determinant + square)
