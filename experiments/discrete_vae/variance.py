"""The variance of estimators' gradients at one point, on one batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from discrete_vae.images import Batches
from discrete_vae.recorded import Recorded
from discrete_vae.runs import LEARNED_RATE
from vma_pyro._system.noise import own_noise


class Variance(NamedTuple):
    """The mean over parameters of the variance of a gradient.

    Attributes:
        variance: of a batch's mean gradient, over draws.
        se: its standard error.
        square: mean over parameters of the squared mean gradient; it has variance / draws too much.
    """

    variance: float
    se: float
    square: float


def measure(
    elbo: Any, programs: Any, batches: Batches, *, draws: int, warm_up: int, seed: int
) -> dict[str, Variance]:
    """Draw gradients of model and guide, whose weights stay as they are.

    Args:
        elbo: the estimator; what it learns itself is trained during the warm-up.
        programs: model and guide.
        batches: one each for the warm-up, then the one on which all gradients are drawn.
        draws, warm_up: numbers of gradients.
        seed: of the noise.
    """
    loss_fn = elbo(programs.model, programs.guide)
    parts = {name: list(getattr(programs, name).parameters()) for name in ("guide", "model")}
    own = {id(p) for part in parts.values() for p in part}
    learned = [p for p in loss_fn.parameters() if id(p) not in own]
    steps = [torch.optim.Adam(learned, LEARNED_RATE)] if learned else []
    recorded = Recorded(loss_fn, wait=1)
    found: dict[str, list[Tensor]] = {name: [] for name in parts}
    with own_noise(seed):
        for _ in range(warm_up):
            recorded.gradient(batches.next())
            for step in steps:
                step.step()
        x = batches.next()
        for _ in range(draws):
            recorded.gradient(x)
            for name, part in parts.items():
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
                found[name].append(torch.cat([g.flatten() for g in gradients]))
    return {name: of(torch.stack(gradients)) for name, gradients in found.items()}


def of(gradients: Float[Tensor, "N P"]) -> Variance:
    """Sum up draws of a gradient."""
    number = len(gradients)
    mean = gradients.mean(0)
    square = (gradients - mean).square().mean(1).double() * number / (number - 1)  # [N]
    error = square.std() / number**0.5
    return Variance(square.mean().item(), error.item(), mean.square().mean().item())
