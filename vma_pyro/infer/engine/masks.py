"""Masks and scales of sites: those of effect handlers, and those of distributions, `fn.mask(...)`.

Weights are masked, and drawing never is. So the score of a site is that of the distribution under its masks, and
the power to which the site stands in the weight is mask times scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from vma_pyro.infer.engine.plates import Site, sample_sites


class Mask(NamedTuple):
    """A mask: which elements of a site count."""

    values: Tensor | bool  # a tensor broadcasts to [*batch, *inner]
    inner: int = 0  # number of dimensions right of the batch, of elements within one event

    def in_event(self, inner: int) -> Tensor | bool:
        """Return the values with so many inner dimensions."""
        if isinstance(self.values, bool):
            return self.values
        return self.values.reshape(self.values.shape + (1,) * (inner - self.inner))

    def any_in_event(self) -> Tensor | bool:
        """Tell whether any element of an event counts: a boolean, or a tensor that broadcasts to [*batch]."""
        if isinstance(self.values, bool) or not self.inner:
            return self.values
        return self.values.flatten(-self.inner).any(-1)

    def __str__(self) -> str:
        """Describe the mask, for errors."""
        if isinstance(self.values, bool):
            return "no mask" if self.values else "a mask of nothing"
        return f"a mask of {int(self.values.sum())} of {self.values.numel()} elements"


def without_mask(fn: Any) -> Any:
    """Remove the masks of a distribution, which drawing ignores."""
    if isinstance(fn, MaskedDistribution):
        return without_mask(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent | ExpandedDistribution):
        base = without_mask(fn.base_dist)
        if base is fn.base_dist:
            return fn
        if isinstance(fn, ExpandedDistribution):
            return base.expand(fn.batch_shape)
        return Independent(base, fn.reinterpreted_batch_ndims)
    return fn


def mask_of(site: Site) -> Mask:
    """Join the masks in a site's log probability, from handlers and from its distribution."""
    own = _own_mask(site["fn"])
    handlers = True if site["mask"] is None else site["mask"]
    return Mask(_both(Mask(handlers).in_event(own.inner), own.values), own.inner)


def score_of(site: Site) -> Any:
    """Compute log q of the drawn values as far as it is a score: zero if the site is reparameterised.

    The score parts decide, and not the family, as some families are partly reparameterised.
    """
    fn = without_mask(site["fn"])
    if fn is site["fn"]:
        return site["score_parts"].score_function
    return fn.score_parts(site["value"], *site["args"], **site["kwargs"]).score_function


def check_same_power(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a latent that stands to another power in p than in q: p/q is then no weight of its draw.

    A mask in the model alone would leave 1/q in the weight, whose mean is the number of values and not 1 (as in a
    guide without the mask of an `obs_mask`). With the same mask in both, a draw that does not count has weight 1.
    """
    for site in sample_sites(guide_trace):
        if site["is_observed"] or site["name"] not in model_trace:
            continue
        other = model_trace.nodes[site["name"]]
        masks = mask_of(other), mask_of(site)
        if not _same_mask(*masks):
            raise ValueError(
                f"site '{site['name']}': expected the same mask in model and guide, got {masks[0]} in the model "
                f"and {masks[1]} in the guide: p/q is no weight; put the same poutine.mask around it in both"
            )
        scales: tuple[Any, Any] = other["scale"], site["scale"]
        if not _same_scale(*scales):
            shown = " in the model and ".join(_show(scale) for scale in scales)
            raise ValueError(
                f"site '{site['name']}': expected the same scale in model and guide, got {shown} in the guide: "
                "p/q is no weight; put the same poutine.scale around it in both"
            )


def has_same_power(a: Site, b: Site) -> bool:
    """Tell whether two sites have the same mask and the same scale."""
    return _same_mask(mask_of(a), mask_of(b)) and _same_scale(a["scale"], b["scale"])


def _own_mask(fn: Any) -> Mask:
    if isinstance(fn, MaskedDistribution):
        base = _own_mask(fn.base_dist)
        return Mask(_both(Mask(fn._mask).in_event(base.inner), base.values), base.inner)
    if isinstance(fn, ExpandedDistribution):
        return _own_mask(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        base = _own_mask(fn.base_dist)
        if isinstance(base.values, bool):
            return base
        values = base.values.expand(fn.base_dist.batch_shape + base.values.shape[base.values.dim() - base.inner :])
        return Mask(values, base.inner + fn.reinterpreted_batch_ndims)
    return Mask(True)


def _both(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a.bool() & b.bool()


def _same_mask(a: Mask, b: Mask) -> bool:
    if isinstance(a.values, bool) and isinstance(b.values, bool):
        return a.values == b.values
    if _same_memory(a.values, b.values):
        return True
    inner = max(a.inner, b.inner)
    both = torch.broadcast_tensors(*(torch.as_tensor(m.in_event(inner), dtype=torch.bool) for m in (a, b)))
    return torch.equal(*(m.cpu() for m in both))


def _same_scale(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    if _same_memory(a, b):
        return True
    both = [scale.detach().cpu() if isinstance(scale, Tensor) else torch.tensor(float(scale)) for scale in (a, b)]
    first, second = torch.broadcast_tensors(*(scale.to(torch.float32) for scale in both))
    return torch.allclose(first, second, rtol=1e-6, atol=0.0)


def _same_memory(a: Any, b: Any) -> bool:
    """Tell whether two tensors are surely the same, without a look at their values, for which a GPU must wait."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )


def _show(scale: Any) -> str:
    if isinstance(scale, Tensor) and scale.numel() > 1:
        return f"a tensor of mean {scale.float().mean().item():g}"
    return f"{float(scale):g}"
