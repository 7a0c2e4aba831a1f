"""Bounds and new images from an index of millions of entries."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.evaluation.chunks import READS_PER_CHUNK, check
from vma_pyro.evaluation.estimates import log_sum, undisturbed
from vma_pyro.evaluation.likelihood import log_likelihood
from vma_pyro.infer import log_weights_given
from vma_pyro.memory import Memory
from vma_pyro.memory.addresses import Addresses
from vma_pyro.memory.index import AddressIndex

IMAGES_PER_CHUNK = 64


def large_log_likelihood(
    index: AddressIndex,
    x: Tensor,
    *,
    num_samples: int = 1000,
    top: int | None = None,
    seed: int = 0,
) -> Float[Tensor, " B"]:
    r"""A lower bound of log p(x | M) per image, for an index of any size.

    Sampled (the default): addresses drawn from q(a | x, M) among all entries, each with a z of its own,

    .. math:: \log \frac1N \sum_n
              \frac{p(a_n \mid M) \, p(x, z_n \mid m_{a_n})}{q(a_n \mid x, M) \, q(z_n \mid x, m_{a_n})}.

    With `top` the sum over addresses is exact for the k most probable ones, and the rest, which can only add to
    the likelihood, is left out:

    .. math:: \log \frac1N \sum_n \sum_{a \in \mathrm{top}_k}
              p(a \mid M) \frac{p(x, z_{na} \mid m_a)}{q(z_{na} \mid x, m_a)}.

    An index with inverted lists draws from its support alone: what it leaves out can only add as well.

    Args:
        index: of the entries, with the model and guide that made it.
        x: images [B, 1, 28, 28].
        num_samples: N.
        top: k, or None to sample addresses.
        seed: of the evaluation's own random stream.

    Returns:
        The bound [B], in nats per image.

    Raises:
        ValueError: N below 1, k outside 1 to |M| or to the support of inverted lists, no images, NaN in x, other
            parameters than those that made the keys.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    check(None, x)
    model, guide = index.model, index.guide
    bounds = []
    with undisturbed(model, guide, seed=seed):
        # A part of the memory for each image: keep their entries within bounds as well.
        for images in x.split(max(1, min(IMAGES_PER_CHUNK, READS_PER_CHUNK // (top or 1)))):
            if top is None:
                found = index.sample(images, num_samples)
                bounds.append(_sampled(index, images, found))
                continue
            address = index.top(images, top).address
            part = index.part(address).to(x.device)
            bound = log_likelihood(model, guide, part, images, num_samples=num_samples, address="exact", seed=seed)
            bounds.append(bound + in_double(_share(index, address, x.device)))
    return torch.cat(bounds)


def sample_images(
    index: AddressIndex, num_images: int, *, seed: int = 0
) -> tuple[Float[Tensor, "N C height width"], Memory]:
    """Draw new images: an address from p(a | M), then an image from its entry alone.

    Args:
        index: of the entries, with the model that draws.
        num_images: N.
        seed: of the draws.

    Returns:
        The images [N, 1, 28, 28], and the entries read, one memory [N, 1, 1, 28, 28].

    Raises:
        ValueError: N below 1; other parameters than those that made the keys.
    """
    model = index.model
    with undisturbed(model, index.guide, seed=seed):
        part = index.part(index.sample_prior(num_images)[:, None])
        return model(part.to(next(model.parameters()).device)), part


def _sampled(index: AddressIndex, x: Tensor, found: Addresses) -> Float[Tensor, " B"]:
    bounds = []
    step = max(1, READS_PER_CHUNK // len(x))
    for address, log_q in zip(found.address.split(step, 1), found.log_prob.split(step, 1), strict=True):
        part = index.part(address).to(x.device)
        each = {"address": torch.arange(address.shape[1], device=x.device)}
        # p(x, z, a | part) / q(z | x, m_a) for every address of the part, once: [k, 1, B].
        log_w = log_weights_given(each, index.model, index.guide, (part, x), num_particles=1).squeeze(1)
        log_w = log_w + _share(index, address, x.device) - log_q.T.to(x.device)
        bounds.append(log_w)
    return log_sum(bounds) - math.log(found.address.shape[1])


def _share(index: AddressIndex, address: Tensor, device: torch.device) -> Float[Tensor, " B"]:
    """log p(a | M) - log p(a | part), the same for all addresses a of a part: its share of the prior."""
    return index.log_prior(address).logsumexp(1).to(device)
