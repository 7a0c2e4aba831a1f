"""Where the nats go: reconstruction, KL(a) and KL(z), and what the memory brings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float, Shaped
from pyro import poutine
from torch import Tensor

from vma_pyro.evaluation.address import choices_before, divergence, kl_of_address
from vma_pyro.evaluation.chunks import check, datapoint_chunks, is_shared, labels_of, sample_chunks, weight_chunks
from vma_pyro.evaluation.estimates import Estimate, distribution_at, undisturbed
from vma_pyro.infer.double import in_double
from vma_pyro.memory import Memory


class Split(NamedTuple):
    """One image's bound taken apart, each [B], in nats; log p(x|M) >= reconstruction - kl_address - kl_z.

    Attributes:
        reconstruction: E_q log p(x | z, m_a).
        kl_address: KL(q(a | x, M) || p(a | M)), exact; of discrete sites before the address (a class, say) and the
            address together.
        kl_z: E_q KL(q(z | x, m_a) || p(z | m_a)), by sampling.
        address_probs: q(a | x, M) [B, S].
    """

    reconstruction: Float[Tensor, " B"]
    kl_address: Float[Tensor, " B"]
    kl_z: Float[Tensor, " B"]
    address_probs: Float[Tensor, "B S"]


@torch.no_grad()
def split_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int = 1,
) -> Split:
    """Reconstruction, KL(a) and KL(z) per image from `num_samples` draws of the guide."""
    plate = pyro.plate("samples", num_samples, dim=-2)
    guide_trace = poutine.trace(plate(guide)).get_trace(memory, x)
    model_trace = poutine.trace(plate(poutine.replay(model, trace=guide_trace))).get_trace(memory, x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    reconstruction = model_trace.nodes["x"]["log_prob"].mean(0)
    kl_z = (guide_trace.nodes["z"]["log_prob"] - model_trace.nodes["z"]["log_prob"]).mean(0)
    if "address" not in guide_trace.nodes:
        return Split(reconstruction, torch.zeros_like(kl_z), kl_z, torch.ones(len(x), 1, device=x.device))
    choices = choices_before(guide_trace)
    if choices:
        kl_address, probs = kl_of_address(model, guide, choices, memory, x)
        return Split(reconstruction, kl_address, kl_z, probs)
    # The address comes first in the guide, so all samples share its distribution: [samples, B, S], take one.
    log_q, log_p = (
        distribution_at(trace, "address").logits.expand(num_samples, len(x), -1)[0].log_softmax(-1)
        for trace in (guide_trace, model_trace)
    )
    return Split(reconstruction, divergence(log_q, log_p), kl_z, log_q.exp())


class KLReport(NamedTuple):
    """What the memory lookup costs and what it brings; estimates are over images, in nats per image.

    Attributes:
        nll: minus the importance-weighted bound with `samples` samples.
        reconstruction: minus E_q log p(x | z, m_a).
        kl_address: KL(q(a|x) || p(a)); at most log|M| for a uniform prior.
        kl_address_bits: the same in bits.
        kl_address_share: the same as a share of log|M|, each image's by its own memory.
        kl_z: E KL(q(z|x,m_a) || p(z|m_a)).
        mutual_information: between x and the address under q, H(mean of q(a|x)) - mean of H(q(a|x)); biased
            down for few images, and only for a shared memory, where an address names the same entry for all.
        perplexity: exp H(q(a|x)), the number of entries in play.
        right_class: share of q(a|x) on entries of x's class; None without labels.
        effective_samples: (sum w)^2 / sum w^2 of the `samples` weights, in samples.
        information_gained: the memoryless model's NLL minus this one's, paired by image; None without it.
        log_memory: log|M| in nats, without padding; the mean over images where their memories differ in size.
        samples: per image.
        nll_of_images: `nll` before averaging [B].
    """

    nll: Estimate
    reconstruction: Estimate
    kl_address: Estimate
    kl_address_bits: Estimate
    kl_address_share: Estimate
    kl_z: Estimate
    mutual_information: Estimate | None
    perplexity: Estimate
    right_class: Estimate | None
    effective_samples: Estimate
    information_gained: Estimate | None
    log_memory: float
    samples: int
    nll_of_images: Float[Tensor, " B"]

    def gained_over(self, memoryless_nll: Tensor) -> KLReport:
        """The same report with the information gained over a model without memory.

        Args:
            memoryless_nll: its NLL of the same images [B].

        Raises:
            ValueError: another number of images.
        """
        _check_one_per_image("memoryless_nll", memoryless_nll, len(self.nll_of_images))
        gained = in_double(memoryless_nll) - self.nll_of_images
        return self._replace(information_gained=Estimate.of(gained))


def kl_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    num_samples: int = 100,
    memoryless_nll: Tensor | None = None,
    seed: int = 0,
) -> KLReport:
    """Take the bound apart for images x under a memory.

    Args:
        model, guide: programs of (memory, x).
        memory: what the programs take, as in `log_likelihood`; `right_class` needs a `Memory` with labels.
        x: images [B, *E].
        labels: class of each image [B], numbered as the memory's labels.
        num_samples: samples per image for the bound, the reconstruction and KL(z).
        memoryless_nll: NLL of the same images under a model without memory [B].
        seed: of the evaluation's own random stream.

    Raises:
        ValueError: labels or memoryless NLL of another length than x; x that does not fit the memory.
    """
    check(memory, x)
    for name, value in (("labels", labels), ("memoryless_nll", memoryless_nll)):
        if value is not None:
            _check_one_per_image(name, value, len(x))
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    parts, log_ws = [], []
    with undisturbed(model, guide, seed=seed):
        for part, part_memory in datapoint_chunks(memory, x, reads_per_image=num_samples):
            parts.append(_split_in_chunks(model, guide, part_memory, part, num_samples))
            chunks = weight_chunks(model, guide, part_memory, part, num_samples, 1, "sampled")
            log_ws.append(torch.cat(list(chunks)))
    split = Split(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    log_w = in_double(torch.cat(log_ws, dim=1))  # [K, B]
    q = split.address_probs
    entropy = torch.special.entr(q).sum(-1)
    nll = math.log(num_samples) - log_w.logsumexp(0)
    share, log_memory = _of_log_memory(split.kl_address, memory, q.shape[-1])
    report = KLReport(
        nll=Estimate.of(nll),
        reconstruction=Estimate.of(-split.reconstruction),
        kl_address=Estimate.of(split.kl_address),
        kl_address_bits=Estimate.of(split.kl_address / math.log(2)),
        kl_address_share=Estimate.of(share),
        kl_z=Estimate.of(split.kl_z),
        mutual_information=_mutual_information(q) if is_shared(memory, x) else None,
        perplexity=Estimate.of(entropy.exp()),
        right_class=None if labels is None else Estimate.of(_share_of_class(q, memory, labels)),
        effective_samples=Estimate.of((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()),
        information_gained=None,
        log_memory=log_memory,
        samples=num_samples,
        nll_of_images=nll,
    )
    return report if memoryless_nll is None else report.gained_over(memoryless_nll)


def _of_log_memory(kl: Float[Tensor, " B"], memory: Any, size: int) -> tuple[Float[Tensor, " B"], float]:
    """KL(a) as a share of log|M|, and log|M|; a memory of one entry has nothing to share, and KL(a) = 0."""
    if isinstance(memory, Memory) and memory.mask is not None:
        log_sizes = memory.num_entries.log().expand(len(kl))
        return torch.where(log_sizes > 0, kl / log_sizes, kl), log_sizes.mean().item()
    log_size = math.log(size)
    return kl / log_size if log_size else kl, log_size


def _check_one_per_image(name: str, values: Tensor, images: int) -> None:
    if values.shape != (images,):
        raise ValueError(f"{name}: expected shape [{images}], one per image, got {list(values.shape)}")


def _split_in_chunks(
    model: Callable[..., Any], guide: Callable[..., Any], memory: Any, x: Tensor, num_samples: int
) -> Split:
    """`split_bound` of any number of samples in bounded memory."""
    total: Split | None = None
    for k in sample_chunks(num_samples, images=len(x)):
        part = split_bound(model, guide, memory, x, num_samples=k)
        share = Split(*(k / num_samples * field for field in part))
        total = share if total is None else Split(*(a + b for a, b in zip(total, share, strict=True)))
    assert total is not None  # num_samples is positive
    return total


def _mutual_information(q: Float[Tensor, "B S"]) -> Estimate:
    """Mean over images of KL(q(a|x) || mean of q(a|x)), [B, S] to an estimate."""
    marginal = q.mean(0)
    return Estimate.of(torch.where(q > 0, q * (q / marginal).log(), 0.0).sum(-1))


def _share_of_class(q: Float[Tensor, "B S"], memory: Any, labels: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Probability of the entries of each image's class [B]."""
    return (q * (labels_of(memory) == labels[:, None])).sum(-1)
