"""The importance-weighted bound of log p(x | M)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.evaluation.chunks import READS_PER_CHUNK, check, datapoint_chunks, weight_chunks
from vma_pyro.evaluation.draws import nesting_of
from vma_pyro.evaluation.estimates import distribution_at, log_sum, undisturbed
from vma_pyro.evaluation.refined import refined
from vma_pyro.infer.engine.running import run


def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int = 1000,
    address: Literal["sampled", "exact"] = "sampled",
    refine: int = 0,
    seed: int = 0,
) -> Float[Tensor, " B"]:
    r"""A lower bound of log p(x | M) per image.

    .. math:: \log \frac1N \sum_n w_n, \qquad
              w_n = \frac{p(x, z_n, a_n \mid M)}{q(a_n \mid x, M) \, q(z_n \mid x, m_{a_n})}

    (Burda et al. 2016, equation 8). With `address="exact"` the address is summed instead of sampled,
    :math:`w_n = \sum_a p(x, z_{na}, a \mid M) / q(z_{na} \mid x, m_a)`: tighter, at |M| times the decoder
    evaluations.

    Args:
        model, guide: programs of (memory, x).
        memory: what the programs take: a `Memory`, or a tensor [S, ...] shared by the images, or [B, S, ...] with
            one dimension more than x. (A `Memory` is encoded once, a tensor once per chunk.)
        x: images [B, *E].
        num_samples: N, samples of z (and of the address if sampled) per image.
        address: "sampled" or "exact".
        refine: steps by which q of the reparameterised latents is optimised for each image before samples are
            drawn, see `guide_gap`; 0 for none. It is a lower bound still, as a rule a tighter one, but no more
            what the guide alone gives: such figures are called refined, and stand in a column of their own.
        seed: of the evaluation's own random stream.

    Returns:
        The bound [B] in nats per image, float64 (on the CPU if x is on a device without it).

    Raises:
        ValueError: N below 1, steps below 0, an unknown mode, NaN in x, x that does not fit the memory, no
            site `address` for "exact".
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    check_whole("refine", refine, least=0)
    if address not in ("sampled", "exact"):
        raise ValueError(f"address: expected 'sampled' or 'exact', got {address!r}")
    check(memory, x)
    with undisturbed(model, guide, seed=seed):
        size = _address_size(guide, memory, x) if address == "exact" else 1
        bounds, nesting = [], 0
        for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=size):
            nesting = nesting or nesting_of(model, guide, part_memory, part)
            q = refined(model, guide, part_memory, part, steps=refine, nesting=nesting) if refine else guide
            chunks = weight_chunks(model, q, part_memory, part, num_samples, size, address, nesting=nesting)
            bounds.append(log_sum(chunks) - math.log(num_samples))
    return torch.cat(bounds)


def _address_size(guide: Callable[..., Any], memory: Any, x: Tensor) -> int:
    image, its_memory = next(datapoint_chunks(guide, memory, x, reads_per_image=READS_PER_CHUNK))
    trace = run(guide, (its_memory, image), {})
    if "address" not in trace.nodes:
        raise ValueError(f"address: expected a site 'address' in the guide, found {list(trace.stochastic_nodes)}")
    return len(distribution_at(trace, "address").enumerate_support(expand=False))
