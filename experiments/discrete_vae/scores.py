"""How good a model and its guide are on images: the evidence lower bound, and the bound from many samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from discrete_vae.programs import Programs
from vma_pyro.evaluation import Mean, undisturbed
from vma_pyro.infer import log_weights

AT_ONCE = 2000  # runs of the model
SEED = 1  # of the samples, the same whenever and whatever is scored


def score(programs: Programs, images: UInt8[Tensor, "N P"], *, samples: int) -> dict[str, Mean]:
    r"""Estimate two bounds of log p(x), mean over images, in nats.

    .. math::
        \frac1K \sum_k \log w_k \qquad \text{and} \qquad \log \frac1K \sum_k w_k

    Args:
        programs: model and guide.
        images: binary.
        samples: K.

    Returns:
        "elbo" and "bound", each with its standard error over images.
    """
    elbo: list[Tensor] = []
    bound: list[Tensor] = []
    with undisturbed(programs.model, programs.guide, seed=SEED):
        for chunk in images.split(max(1, AT_ONCE // samples)):
            args: Any = (chunk.float(),)
            log_w = log_weights(programs.model, programs.guide, args, num_particles=samples).double()  # [K, B]
            elbo.append(log_w.mean(0))
            bound.append(log_w.logsumexp(0) - math.log(samples))
    return {"elbo": Mean.of(torch.cat(elbo)), "bound": Mean.of(torch.cat(bound))}
