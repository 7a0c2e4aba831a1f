"""Where the nats go: what each observed site costs, the KL of each latent site, and what the memory brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vma_pyro._system.double import in_double, widest_float
from vma_pyro.evaluation.chunks import check, datapoint_chunks, is_shared, labels_of, weight_chunks
from vma_pyro.evaluation.draws import nesting_of
from vma_pyro.evaluation.estimates import Mean, undisturbed
from vma_pyro.evaluation.split import NO_SITES, BoundParts, joined, split_bound, split_in_chunks
from vma_pyro.infer.engine.weights import effective_samples
from vma_pyro.memory import Memory

__all__ = ["BoundParts", "KLReport", "kl_report", "mutual_information", "split_bound"]


class KLReport(NamedTuple):
    """Where the nats go; estimates are over images, in nats per image unless said otherwise.

    Of any program, `reconstruction + kl_address + kl_z` is minus its single-sample bound, and so are the sums of
    `reconstructions` and of `kl`.

    Attributes:
        nll: minus the importance-weighted bound with `samples` samples.
        reconstruction: minus E_q log p of all observed sites; minus E_q log p(x | z, m_a) if that is `x` alone.
        kl_address: KL(q(a|x) || p(a)), image by image; of discrete sites before the address (a class, say) and the
            address together. At most log|M| for a uniform prior; zero without an address.
        kl_address_bits: the same in bits.
        kl_address_share: the same as a share of the log|M| of each image.
        kl_z: of all other latent sites together; E KL(q(z|x,m_a) || p(z|m_a)) if that is `z` alone.
        mutual_information: between x and the address under q, H(mean of q(a|x)) - mean of H(q(a|x)); biased
            down for few images, and only for a shared memory, where an address names the same entry for all.
        perplexity: exp H(q(a|x)), the number of entries in play.
        right_class: share of q(a|x) on entries of x's class; None without labels or without an address.
        effective_samples: (sum w)^2 / sum w^2 of the `samples` weights, in samples.
        information_gained: the memoryless model's NLL minus this one's, paired by image; None without it.
        log_memory: log|M| in nats; the mean over images where their memories differ in size.
        samples: per image.
        nll_of_images: `nll` before averaging [B].
        reconstructions: the terms of `reconstruction` by observed site, in the order of the model.
        kl: those of `kl_address + kl_z` by latent site, in the order of the model.
        how: each of `kl` was found; "exact", "mean over draws" or "sampled", see `BoundParts`.
    """

    nll: Mean
    reconstruction: Mean
    kl_address: Mean
    kl_address_bits: Mean
    kl_address_share: Mean
    kl_z: Mean
    mutual_information: Mean | None
    perplexity: Mean
    right_class: Mean | None
    effective_samples: Mean
    information_gained: Mean | None
    log_memory: float
    samples: int
    nll_of_images: Float[Tensor, " B"]
    reconstructions: Mapping[str, Mean] = NO_SITES
    kl: Mapping[str, Mean] = NO_SITES
    how: Mapping[str, str] = NO_SITES

    def parts(self) -> list[tuple[str, Mean]]:
        """A label for each site and what it costs; the parts add up to minus the single-sample bound."""
        observed = [(f"minus reconstruction of {name}", cost) for name, cost in self.reconstructions.items()]
        latent = [(f"KL({SYMBOLS.get(name, name)}), {self.how[name]}", cost) for name, cost in self.kl.items()]
        return observed + latent

    def __str__(self) -> str:
        """A line for each part."""
        lines = [(f"NLL, {self.samples} samples", self.nll), *self.parts()]
        return "\n".join(f"{label}: {cost}" for label, cost in lines)

    def gained_over(self, memoryless_nll: Tensor) -> KLReport:
        """The same report with the information gained over a model without memory.

        Args:
            memoryless_nll: its NLL of the same images [B].

        Raises:
            ValueError: another number of images.
        """
        _check_one_per_image("memoryless_nll", memoryless_nll, len(self.nll_of_images))
        gained = in_double(memoryless_nll) - self.nll_of_images
        return self._replace(information_gained=Mean.of(gained))


SYMBOLS = {"address": "a"}  # of sites, in the paper


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
    with undisturbed(model, guide, seed=seed):
        parts, log_w = _parts_and_weights(model, guide, memory, x, num_samples)
    report = _report(parts, log_w, memory, x, labels)
    return report if memoryless_nll is None else report.gained_over(memoryless_nll)


def _parts_and_weights(
    model: Callable[..., Any], guide: Callable[..., Any], memory: Any, x: Tensor, num_samples: int
) -> tuple[BoundParts, Float[Tensor, "K B"]]:
    """Take the bound of all images apart, and draw log weights of their own, some images at a time."""
    parts, log_ws = [], []
    nesting = 0
    for part, part_memory in datapoint_chunks(guide, memory, x, reads_per_image=num_samples):
        nesting = nesting or nesting_of(model, guide, part_memory, part)
        programs = (model, guide, part_memory, part)
        parts.append(split_in_chunks(*programs, num_samples=num_samples, nesting=nesting))
        chunks = weight_chunks(*programs, num_samples, 1, "sampled", nesting=nesting)
        log_ws.append(torch.cat(list(chunks)))
    return joined(parts), in_double(torch.cat(log_ws, dim=1))


def _report(
    parts: BoundParts, log_w: Float[Tensor, "K B"], memory: Any, x: Tensor, labels: Tensor | None
) -> KLReport:
    q, num_samples = parts.address_probs, len(log_w)
    nll = math.log(num_samples) - log_w.logsumexp(0)
    log_sizes = _log_sizes(memory, q)
    shares = parts.kl_address / torch.where(log_sizes > 0, log_sizes, 1.0).to(parts.kl_address)
    return KLReport(
        nll=Mean.of(nll),
        reconstruction=Mean.of(-parts.reconstruction),
        kl_address=Mean.of(parts.kl_address),
        kl_address_bits=Mean.of(parts.kl_address / math.log(2)),
        kl_address_share=Mean.of(shares),
        kl_z=Mean.of(parts.kl_z),
        mutual_information=mutual_information(q) if is_shared(memory, x) else None,
        perplexity=Mean.of(torch.special.entr(q).sum(-1).exp()),
        right_class=None if labels is None else _share_of_class(q, memory, labels),
        effective_samples=Mean.of(effective_samples(log_w)),
        information_gained=None,
        # As a mean of differences, which leaves equal sizes as they are to the last digit.
        log_memory=(log_sizes[0] + (log_sizes - log_sizes[0]).mean()).item(),
        samples=num_samples,
        nll_of_images=nll,
        reconstructions={name: Mean.of(-value) for name, value in parts.observed.items()},
        kl={name: Mean.of(value) for name, value in parts.kl.items()},
        how=parts.how,
    )


def _check_one_per_image(name: str, values: Tensor, images: int) -> None:
    if values.shape != (images,):
        raise ValueError(f"{name}: expected shape [{images}], one per image, got {list(values.shape)}")


def _log_sizes(memory: Any, q: Float[Tensor, "B S"]) -> Float[Tensor, " B"]:
    """log|M| of each image, without what is no entry for it: padding, and what is left out."""
    if isinstance(memory, Memory) and memory.size == q.shape[-1]:
        return in_double(memory.num_entries.to(q.device)).log().expand(len(q))
    log_size = math.log(q.shape[-1])
    return in_double(torch.full((len(q),), log_size, dtype=widest_float(q.device), device=q.device))


def mutual_information(q: Float[Tensor, "..."]) -> Mean:
    """Mean over images of KL(q(a|x) || mean of q(a|x)) in nats, of a memory that they share.

    Args:
        q: probabilities of the addresses [B, S], see `address_posterior`.

    Raises:
        ValueError: no images, other dimensions than [B, S], values that are no probabilities.
    """
    if q.dim() != 2 or 0 in q.shape:
        raise ValueError(f"q: expected probabilities [B, S] of at least one image, got shape {list(q.shape)}")
    rounding = 8 * torch.finfo(q.dtype).eps
    q = in_double(q)
    sums = q.sum(1, keepdim=True)
    if not bool((q >= 0).all()) or not bool(((sums - 1).abs() < max(1e-3, rounding)).all()):
        raise ValueError(
            f"q: expected probabilities that add up to 1 for each image, got values from {q.min().item():g} with "
            f"sums from {sums.min().item():g} to {sums.max().item():g}"
        )
    q = q / sums
    marginal = q.mean(0)
    return Mean.of(torch.where(q > 0, q * (q / marginal).log(), 0.0).sum(-1))


def _share_of_class(q: Float[Tensor, "B S"], memory: Any, labels: Shaped[Tensor, " B"]) -> Mean | None:
    """Probability of the entries of each image's class; None where there is nothing to look up."""
    of_entries = labels_of(memory)
    if q.shape[-1] == 1 < of_entries.shape[-1]:
        return None
    if q.shape[-1] != of_entries.shape[-1]:
        raise ValueError(
            f"memory.labels: expected one label for each of {q.shape[-1]} addresses, got {of_entries.shape[-1]}"
        )
    return Mean.of((q * (of_entries == labels[:, None])).sum(-1))
