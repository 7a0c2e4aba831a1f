"""Likelihoods, the split of the KL, and few-shot classification, each with its standard error.

Everything here runs without gradients, in evaluation mode, under its own random stream: nothing disturbs a
training run. Model and guide are any Pyro programs with the signature (memory, x), the plate `data` and the sites
`address`, `z` and `x`; a model without an address (the memoryless one) has zero address terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from vma_pyro.infer import log_weights, log_weights_given
from vma_pyro.memory import Memory, check_finite

# Decoder evaluations per chunk: bounds the memory of an evaluation at a few hundred MB for the paper's networks.
READS_PER_CHUNK = 2048


class Estimate(NamedTuple):
    """A mean over images.

    Attributes:
        mean: in the unit of the quantity (nats per image unless said otherwise).
        se: standard error of the mean over the images.
        n: number of images.
    """

    mean: float
    se: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per image, [n]."""
        values = values.double()
        n = values.numel()
        se = values.std().item() / math.sqrt(n) if n > 1 else math.nan
        return cls(values.mean().item(), se, n)

    def __str__(self) -> str:
        """Mean and standard error."""
        return f"{self.mean:.2f} ± {self.se:.2f}"


@contextmanager
def undisturbed(*modules: Any, seed: int, device: torch.device) -> Iterator[None]:
    """No gradients, evaluation mode and an own random stream; all is restored on leaving."""
    modules = tuple(m for m in modules if isinstance(m, nn.Module))
    training = [m.training for m in modules]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.train(mode)


def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Memory | Tensor,
    x: Tensor,
    *,
    num_samples: int = 1000,
    address: Literal["sampled", "exact"] = "sampled",
    seed: int = 0,
) -> Tensor:
    r"""A lower bound of log p(x | M) per image.

    .. math:: \log \frac1N \sum_n w_n, \qquad
              w_n = \frac{p(x, z_n, a_n \mid M)}{q(a_n \mid x, M) \, q(z_n \mid x, m_{a_n})}

    (Burda et al. 2016, equation 8). With `address="exact"` the address is summed instead of sampled,
    :math:`w_n = \sum_a p(x, z_{na}, a \mid M) / q(z_{na} \mid x, m_a)`: tighter, at |M| times the decoder
    evaluations.

    Args:
        model, guide: programs of (memory, x).
        memory: entries [S, *E] shared by the images, or [B, S, *E].
        x: images [B, *E].
        num_samples: N, samples of z (and of the address if sampled) per image.
        address: "sampled" or "exact".
        seed: of the evaluation's own random stream.

    Returns:
        The bound [B], in nats per image.

    Raises:
        ValueError: N below 1, an unknown mode, NaN in x, x that does not fit the memory, no `address` site for
            "exact".
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    if address not in ("sampled", "exact"):
        raise ValueError(f"address: expected 'sampled' or 'exact', got {address!r}")
    memory = _checked(memory, x)
    with undisturbed(model, guide, seed=seed, device=x.device):
        size = _address_size(guide, memory, x) if address == "exact" else 1
        bounds = []
        for part, part_memory in _datapoint_chunks(
            memory, x, max(1, READS_PER_CHUNK // min(size, READS_PER_CHUNK))
        ):
            total = torch.full((len(part),), -math.inf, dtype=torch.float64, device=x.device)
            for log_w in _weight_chunks(model, guide, part_memory, part, num_samples, size, address):
                total = torch.logaddexp(total, log_w.double().flatten(0, -2).logsumexp(0))
            bounds.append(total - math.log(num_samples))
    return torch.cat(bounds)


def _weight_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Memory,
    x: Tensor,
    num_samples: int,
    size: int,
    address: str,
) -> Iterator[Tensor]:
    """Log weights [..., B] of at most about READS_PER_CHUNK decoder evaluations at a time."""
    reads = size * len(x)
    samples = max(1, READS_PER_CHUNK // reads)
    for start in range(0, num_samples, samples):
        k = min(samples, num_samples - start)
        if address == "sampled":
            yield log_weights(model, guide, (memory, x), num_particles=k)
            continue
        rows = max(1, READS_PER_CHUNK // (k * len(x)))
        for addresses in torch.arange(size, device=x.device).split(rows):
            yield log_weights_given({"address": addresses}, model, guide, (memory, x), num_particles=k)


def _datapoint_chunks(memory: Memory, x: Tensor, rows: int) -> Iterator[tuple[Tensor, Memory]]:
    # A memory of its own per image is encoded once per chunk: keep its entries within bounds as well.
    if not memory.is_shared:
        rows = max(1, min(rows, READS_PER_CHUNK // memory.size))
    rows = min(rows, 256)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield x[part], memory.datapoints(part)


def _checked(memory: Memory | Tensor, x: Tensor) -> Memory:
    if x.dim() < 1 or len(x) == 0:
        raise ValueError(f"x: expected at least one image, got shape {list(x.shape)}")
    check_finite("x", x)
    memory = memory if isinstance(memory, Memory) else Memory(memory, event_dim=x.dim() - 1)
    memory.check(x)
    return memory


def _address_size(guide: Callable[..., Any], memory: Memory, x: Tensor) -> int:
    trace = poutine.trace(guide).get_trace(memory.datapoints(slice(0, 1)), x[:1])
    if "address" not in trace.nodes:
        raise ValueError(f"address: expected a site 'address' in the guide, found {list(trace.stochastic_nodes)}")
    return len(distribution_at(trace, "address").enumerate_support(expand=False))


def distribution_at(trace: poutine.Trace, site: str) -> Any:
    """The distribution of a site; Pyro's types say no more than that it is callable."""
    return trace.nodes[site]["fn"]


class Split(NamedTuple):
    """One image's bound taken apart, each [B], in nats; log p(x|M) >= reconstruction - kl_address - kl_z.

    Attributes:
        reconstruction: E_q log p(x | z, m_a).
        kl_address: KL(q(a | x, M) || p(a | M)), exact.
        kl_z: E_q KL(q(z | x, m_a) || p(z | m_a)), by sampling.
        address_probs: q(a | x, M) [B, S].
    """

    reconstruction: Tensor
    kl_address: Tensor
    kl_z: Tensor
    address_probs: Tensor


@torch.no_grad()
def split_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Memory,
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
    # The address comes first in the guide, so all samples share its distribution: [samples, B, S], take one.
    log_q = distribution_at(guide_trace, "address").logits[0].log_softmax(-1)
    log_p = distribution_at(model_trace, "address").logits[0].log_softmax(-1)
    q = log_q.exp()
    # 0 log 0 = 0: an address without probability costs nothing.
    kl_address = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    return Split(reconstruction, kl_address, kl_z, q)


class KLReport(NamedTuple):
    """What the memory lookup costs and what it brings; estimates are over images, in nats per image.

    Attributes:
        nll: minus the importance-weighted bound with `samples` samples.
        reconstruction: minus E_q log p(x | z, m_a).
        kl_address: KL(q(a|x) || p(a)); at most log|M| for a uniform prior.
        kl_address_bits: the same in bits.
        kl_address_share: the same as a share of log|M|.
        kl_z: E KL(q(z|x,m_a) || p(z|m_a)).
        mutual_information: between x and the address under q, H(mean of q(a|x)) - mean of H(q(a|x)); biased
            down for few images, and only for a shared memory, where an address names the same entry for all.
        perplexity: exp H(q(a|x)), the number of entries in play.
        right_class: share of q(a|x) on entries of x's class; None without labels.
        effective_samples: (sum w)^2 / sum w^2 of the `samples` weights, in samples.
        information_gained: the memoryless model's NLL minus this one's, paired by image; None without it.
        log_memory: log|M| in nats.
        samples: per image.
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


def kl_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Memory | Tensor,
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
        memory: entries [S, *E] or [B, S, *E]; its labels are needed for `right_class`.
        x: images [B, *E].
        labels: class of each image [B], numbered as the memory's labels.
        num_samples: samples per image for the bound, the reconstruction and KL(z).
        memoryless_nll: NLL of the same images under a model without memory [B].
        seed: of the evaluation's own random stream.

    Raises:
        ValueError: labels or memoryless NLL of another length than x; x that does not fit the memory.
    """
    memory = _checked(memory, x)
    for name, value in (("labels", labels), ("memoryless_nll", memoryless_nll)):
        if value is not None and value.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected shape [{len(x)}], one per image, got {list(value.shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    parts, log_ws = [], []
    with undisturbed(model, guide, seed=seed, device=x.device):
        for part, part_memory in _datapoint_chunks(memory, x, max(1, READS_PER_CHUNK // num_samples)):
            parts.append(_split_in_chunks(model, guide, part_memory, part, num_samples))
            chunks = _weight_chunks(model, guide, part_memory, part, num_samples, 1, "sampled")
            log_ws.append(torch.cat(list(chunks)))
    split = Split(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    log_w = torch.cat(log_ws, dim=1).double()  # [K, B]
    q = split.address_probs
    entropy = torch.special.entr(q).sum(-1)
    nll = math.log(num_samples) - log_w.logsumexp(0)
    log_memory = math.log(q.shape[-1])
    return KLReport(
        nll=Estimate.of(nll),
        reconstruction=Estimate.of(-split.reconstruction),
        kl_address=Estimate.of(split.kl_address),
        kl_address_bits=Estimate.of(split.kl_address / math.log(2)),
        kl_address_share=Estimate.of(split.kl_address / log_memory if log_memory else split.kl_address),
        kl_z=Estimate.of(split.kl_z),
        mutual_information=_mutual_information(q) if memory.is_shared else None,
        perplexity=Estimate.of(entropy.exp()),
        right_class=None if labels is None else Estimate.of(_share_of_class(q, memory, labels)),
        effective_samples=Estimate.of((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()),
        information_gained=None if memoryless_nll is None else Estimate.of(memoryless_nll.double() - nll),
        log_memory=log_memory,
        samples=num_samples,
    )


def _split_in_chunks(
    model: Callable[..., Any], guide: Callable[..., Any], memory: Memory, x: Tensor, num_samples: int
) -> Split:
    """`split_bound` of any number of samples in bounded memory."""
    total: Split | None = None
    chunk = max(1, READS_PER_CHUNK // len(x))
    for start in range(0, num_samples, chunk):
        k = min(chunk, num_samples - start)
        part = split_bound(model, guide, memory, x, num_samples=k)
        share = Split(*(k / num_samples * field for field in part))
        total = share if total is None else Split(*(a + b for a, b in zip(total, share, strict=True)))
    assert total is not None  # num_samples is positive
    return total


def _mutual_information(q: Tensor) -> Estimate:
    """Mean over images of KL(q(a|x) || mean of q(a|x)), [B, S] to an estimate."""
    marginal = q.mean(0)
    return Estimate.of(torch.where(q > 0, q * (q / marginal).log(), 0.0).sum(-1))


def _share_of_class(q: Tensor, memory: Memory, labels: Tensor) -> Tensor:
    """Probability of the entries of each image's class [B]."""
    if memory.labels is None:
        raise ValueError("memory.labels: expected labels of the entries, got None")
    return (q * (memory.labels == labels[:, None])).sum(-1)


def address_posterior(
    guide: Callable[..., Any], memory: Memory | Tensor, x: Tensor, *, batch_size: int = 64
) -> Tensor:
    """q(a | x, M), [B, S], computed in chunks of `batch_size` images."""
    memory = _checked(memory, x)
    probs = []
    with undisturbed(guide, seed=0, device=x.device):
        for part, part_memory in _datapoint_chunks(memory, x, batch_size):
            trace = poutine.trace(guide).get_trace(part_memory, part)
            if "address" not in trace.nodes:
                raise ValueError(f"guide: expected a site 'address', found {list(trace.stochastic_nodes)}")
            probs.append(distribution_at(trace, "address").probs)
    return torch.cat(probs)


def classify(guide: Callable[..., Any], memory: Memory, x: Tensor, *, num_classes: int | None = None) -> Tensor:
    """p(c | x) = sum of q(a | x, M) over the entries a of class c; no fine-tuning (section 4.2 of the paper).

    Args:
        guide: a program of (memory, x) with a site `address`.
        memory: entries [S, *E] or [B, S, *E] with labels.
        x: images [B, *E].
        num_classes: C; None takes the largest label plus one.

    Returns:
        Probabilities [B, C].

    Raises:
        ValueError: a memory without labels, or with labels beyond `num_classes`.
    """
    if memory.labels is None:
        raise ValueError("memory.labels: expected labels of the entries, got None")
    low, high = int(memory.labels.min()), int(memory.labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ValueError(f"memory.labels: expected values 0..{num_classes - 1}, got {low}..{high}")
    q = address_posterior(guide, memory, x)
    labels = memory.labels.expand(len(x), -1)
    return torch.zeros(len(x), num_classes, dtype=q.dtype, device=q.device).scatter_add_(1, labels, q)
