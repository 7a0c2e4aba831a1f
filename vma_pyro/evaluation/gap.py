"""How much of a bound is the guide's: what a better q for each datapoint would win."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro._system.whole import check_whole
from vma_pyro.evaluation.chunks import check, datapoint_chunks, weight_chunks
from vma_pyro.evaluation.draws import nesting_of
from vma_pyro.evaluation.estimates import Mean, undisturbed
from vma_pyro.evaluation.refined import PARTICLES, RATE, refined


class GuideGap(NamedTuple):
    """What refining the guide for each datapoint wins, nats per image; all bounds are lower ones of log p(x | M).

    Attributes:
        elbo: the single-sample bound of the guide as it is.
        refined_elbo: that of the refined guide, on draws that the refinement has not seen.
        gap: the second less the first, paired by image. It is the guide's part of the distance between the ELBO
            and log p(x | M) as far as the refinement finds it: never more than there is, but for noise.
        bound: the importance-weighted bound with `samples` samples.
        refined_bound: the same of the refined guide.
        bound_gap: the second less the first, paired by image.
        samples: per image.
        steps: of the refinement.
    """

    elbo: Mean
    refined_elbo: Mean
    gap: Mean
    bound: Mean
    refined_bound: Mean
    bound_gap: Mean
    samples: int
    steps: int

    def __str__(self) -> str:
        """A line for each bound."""
        lines = (
            ("ELBO", self.elbo, self.refined_elbo, self.gap),
            (f"{self.samples} samples", self.bound, self.refined_bound, self.bound_gap),
        )
        return "\n".join(
            f"{name}: {one}, refined by {self.steps} steps {other}: {gap} nats" for name, one, other, gap in lines
        )


def guide_gap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    steps: int = 300,
    num_samples: int = 100,
    particles: int = PARTICLES,
    learning_rate: float = RATE,
    seed: int = 0,
) -> GuideGap:
    r"""Say in nats how much of a bound is lost in the guide's reparameterised latents.

    For each image, q(z | x, ...) is optimised by itself, see `refined`. What that wins is amortisation: one
    network has to serve all images (Cremer et al. 2018, who divide the distance to log p in the same way). What a
    richer family would win, or another q of the discrete latents, is not in it.

    Args:
        model, guide: programs of (memory, x).
        memory: what the programs take, as in `log_likelihood`.
        x: images [B, *E].
        steps: of Adam on each image's correction.
        num_samples: draws per image, of which the ELBO is the mean and the bound the logarithm of the mean weight.
        particles: draws behind each step.
        learning_rate: of Adam, in units of unconstrained latents.
        seed: of the evaluation's own random stream.

    Raises:
        ValueError: a number below 1; no latent site of the guide is reparameterised; x that does not fit the
            memory.
    """
    for name, number in (("steps", steps), ("num_samples", num_samples), ("particles", particles)):
        check_whole(name, number)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: expected a finite number above 0, got {learning_rate}")
    check(memory, x)
    plain: list[Tensor] = []
    better: list[Tensor] = []
    nesting = 0
    with undisturbed(model, guide, seed=seed):
        for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=1):
            nesting = nesting or nesting_of(model, guide, part_memory, part)
            other = refined(
                model,
                guide,
                part_memory,
                part,
                steps=steps,
                nesting=nesting,
                particles=particles,
                learning_rate=learning_rate,
            )
            for found, q in ((plain, guide), (better, other)):
                chunks = weight_chunks(model, q, part_memory, part, num_samples, 1, "sampled", nesting=nesting)
                found.append(in_double(torch.cat(list(chunks))))
    log_w, other_w = torch.cat(plain, 1), torch.cat(better, 1)  # [K, B]
    elbo, other_elbo = log_w.mean(0), other_w.mean(0)
    bound, other_bound = (w.logsumexp(0) - math.log(num_samples) for w in (log_w, other_w))
    return GuideGap(
        elbo=Mean.of(elbo),
        refined_elbo=Mean.of(other_elbo),
        gap=Mean.of(other_elbo - elbo),
        bound=Mean.of(bound),
        refined_bound=Mean.of(other_bound),
        bound_gap=Mean.of(other_bound - bound),
        samples=num_samples,
        steps=steps,
    )
