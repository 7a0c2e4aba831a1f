r"""The straight-through family: one-hot values x in the program, and a gradient for log q from that for x.

With g the gradient of the objective with respect to x, :math:`\phi = \log q`, and
:math:`J(\pi) = \mathrm{diag}(\pi) - \pi \pi^T`, each relaxation says what the gradient with respect to
:math:`\phi` is taken to be. All are biased: the program is differentiated between its values, where it is never
run. They cost one evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.whole import check_whole

Weights = Float[Tensor, "*B S"]


def gumbel_straight_through(log_q: Weights, temperature: float) -> Weights:
    r"""Straight-through Gumbel-softmax (Jang et al. 2017): the largest of y, and the gradient of y.

    .. math:: y = \mathrm{softmax}((\phi + g) / \tau), \qquad \tfrac1\tau J(y) \, g
    """
    return F.gumbel_softmax(log_q, temperature, hard=True)


def straight_through(log_q: Weights, temperature: float) -> Weights:
    r"""Straight-through (Bengio et al. 2013); exact for objectives linear in x at tau = 1.

    .. math:: \tfrac1\tau J(\mathrm{softmax}(\phi / \tau)) \, g
    """
    return with_gradient_of(drawn(log_q), (log_q / temperature).softmax(-1))


def reinmax(log_q: Weights, temperature: float) -> Weights:
    r"""ReinMax (Liu et al. 2023), Heun's method; exact for objectives quadratic in x at tau = 1.

    .. math:: 2 J(\pi) \, g - \tfrac12 J(q) \, g, \qquad
              \pi = \tfrac12 \big( \mathrm{softmax}(\phi / \tau) + x \big)

    At tau = 1 it is ZGR (Shekhovtsov 2023), the limit of `GumbelRao` for tau to 0, draw by draw.
    """
    x = drawn(log_q)
    midway = ((log_q / temperature).softmax(-1).detach() + x) / 2
    return with_gradient_of(x, 2 * moved(midway.log(), log_q).softmax(-1) - log_q.softmax(-1) / 2)


@dataclass(frozen=True)
class GumbelRao:
    r"""Gumbel-Rao (Paulus et al. 2021): straight-through Gumbel-softmax with less noise, its mean given x.

    .. math:: \tfrac1\tau \, E_{z \mid x} \, J(\mathrm{softmax}(z / \tau)) \, g

    over `draws` of the perturbed log q given that x is the largest. The noise z - phi is held fixed.
    """

    draws: int = 10

    def __post_init__(self) -> None:
        """Refuse no draws."""
        check_whole("draws", self.draws)

    def __call__(self, log_q: Weights, temperature: float) -> Weights:
        """Draw x, and take the mean of the soft values."""
        x = drawn(log_q)
        perturbed = given_largest(log_q.detach(), x, self.draws)  # [draws, *B, S]
        soft = (moved(perturbed, log_q) / temperature).softmax(-1).mean(0)
        return with_gradient_of(x, soft)


@dataclass(frozen=True)
class GappedStraightThrough:
    r"""Gapped straight-through (Fan et al. 2022): phi is shifted until x leads by a gap.

    .. math:: \tfrac1\tau J(\mathrm{softmax}(\phi' / \tau)) \, g, \qquad \phi'_x = \max \phi, \quad
              \phi'_s = \min(\phi_s, \max \phi - \text{gap})

    The shifts are held fixed.
    """

    gap: float = 1.0

    def __call__(self, log_q: Weights, temperature: float) -> Weights:
        """Draw x, and shift."""
        x = drawn(log_q)
        phi = log_q.detach()
        top = phi.amax(-1, keepdim=True)
        shifted = torch.where(x > 0, top, torch.minimum(phi, top - self.gap))
        return with_gradient_of(x, (moved(shifted, log_q) / temperature).softmax(-1))


def drawn(log_q: Weights) -> Weights:
    """Draw one-hot values."""
    with torch.no_grad():
        if log_q.shape[-1] == 2:  # one uniform number says which, in a fifth of the time
            second = (torch.rand_like(log_q[..., 1]) < log_q[..., 1].exp()).to(log_q)
            return torch.stack([1 - second, second], -1)
        gumbel = -torch.empty_like(log_q).exponential_().log()
        first = (log_q + gumbel).argmax(-1, keepdim=True)
        return torch.zeros_like(log_q).scatter(-1, first, 1.0)  # one_hot would look at the values


def given_largest(log_q: Weights, x: Weights, number: int) -> Float[Tensor, "N *B S"]:
    """Draw log q, which is normalised, plus Gumbel noise, given which value is the largest."""
    noise = torch.empty(number, *log_q.shape, dtype=log_q.dtype, device=log_q.device).exponential_()
    largest = (noise * x).sum(-1, keepdim=True)  # -log of its uniform
    return torch.where(x > 0, -largest.log(), -(noise * (-log_q).exp() + largest).log())


def moved(values: Tensor, log_q: Weights) -> Tensor:
    """Let values that are held fixed move with log q, one for one; impossible ones stay where they are."""
    step = torch.where(log_q > -torch.inf, log_q, 0.0)
    return values.detach() + (step - step.detach())


def with_gradient_of(x: Weights, soft: Weights) -> Weights:
    """Give the value of one tensor the gradient of another."""
    return x + (soft - soft.detach())
