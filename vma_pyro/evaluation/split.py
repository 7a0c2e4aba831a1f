"""The bound of each image taken apart, site by site; the parts of any program add up to its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.distributions import Unit
from torch import Tensor

from vma_pyro.evaluation.address import ADDRESS, Lookup, address_probs, given_address, kl_of_lookup, lookup_of
from vma_pyro.evaluation.chunks import encoded_by, sample_chunks
from vma_pyro.evaluation.divergence import EXACT, MEAN, SAMPLED, kl_of_site
from vma_pyro.evaluation.draws import Draws, draw, nesting_of
from vma_pyro.infer.engine.plates import sample_sites

NO_SITES: Mapping[str, Any] = MappingProxyType({})


class BoundParts(NamedTuple):
    r"""The single-sample bound of each image taken apart, in nats.

    .. math:: \log p(x \mid M) \ge \sum_o E_q \log p(o \mid \cdot)
              - \sum_s E_q \left[ \log q(s \mid \cdot) - \log p(s \mid \cdot) \right]

    over the observed sites o and the latent sites s. Masks and scales of a site count as in the bound; its plates
    inside the plate `data` are summed.

    Attributes:
        reconstruction: the first sum [B]; E_q log p(x | z, m_a) if `x` alone is observed.
        kl_address: KL of the address, and of discrete sites before it (a class, say) with it [B].
        kl_z: of all other latent sites together [B]; E_q KL(q(z | x, m_a) || p(z | m_a)) if that is `z` alone.
        address_probs: q(a | x, M) [B, S]; [B, 1] without an address.
        observed: the terms of `reconstruction` by site [B], in the order of the model.
        kl: those of `kl_address + kl_z` by site [B], in the order of the model.
        how: of each of `kl`: "exact"; "mean over draws", in closed form given each draw of what comes before (also
            where a single draw does not tell whether that matters); or "sampled", the mean of log q - log p at the
            draws of the site.
    """

    reconstruction: Float[Tensor, " B"]
    kl_address: Float[Tensor, " B"]
    kl_z: Float[Tensor, " B"]
    address_probs: Float[Tensor, "B S"]
    observed: Mapping[str, Float[Tensor, " B"]] = NO_SITES
    kl: Mapping[str, Float[Tensor, " B"]] = NO_SITES
    how: Mapping[str, str] = NO_SITES


@torch.no_grad()
def split_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int = 1,
) -> BoundParts:
    """Reconstruction and KLs per image from `num_samples` draws of the guide.

    Args:
        model, guide: programs of (memory, x), whose sites are in the plate `data`.
        memory: what the programs take.
        x: images [B, *E].
        num_samples: draws per image.

    Raises:
        ValueError: no draws; a site outside the plate `data`, of one program only, or given in the guide alone; an
            address of several values per image.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    memory = encoded_by(guide, memory, x)
    nesting = None if num_samples == 1 else nesting_of(model, guide, memory, x)
    return split_once(model, guide, memory, x, num_samples=num_samples, nesting=nesting)


def split_once(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int,
    nesting: int | None,
) -> BoundParts:
    """`split_bound` of programs whose number of plate dimensions is known, or of one draw."""
    draws = draw(model, guide, memory, x, num_samples=num_samples, nesting=nesting)
    nesting = draws.layout.nesting
    lookup = lookup_of(draws.guide)
    kl: dict[str, tuple[Tensor, str]] = {}
    if lookup is None:
        probs = _without_lookup(draws, x)
    elif lookup.choices:
        known, probs = kl_of_lookup(model, guide, lookup, memory, x, num_samples=num_samples, nesting=nesting)
        kl |= known
    else:
        probs = address_probs(draws.guide, nesting, lookup)
    return _split(draws, kl, lookup, probs, x)


def split_in_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    num_samples: int,
    nesting: int,
) -> BoundParts:
    """`split_bound` of any number of samples in bounded memory."""
    counts = list(sample_chunks(num_samples, images=len(x)))
    parts = [split_once(model, guide, memory, x, num_samples=k, nesting=nesting) for k in counts]

    def mean(values: list[Tensor]) -> Tensor:
        first, *others = (k / num_samples * value for k, value in zip(counts, values, strict=True))
        return sum(others, first)

    return _combined(parts, mean)


def joined(parts: Sequence[BoundParts]) -> BoundParts:
    """One split of the images of several."""
    return _combined(parts, torch.cat)


def _split(
    draws: Draws, known: Mapping[str, tuple[Tensor, str]], lookup: Lookup | None, probs: Tensor, x: Tensor
) -> BoundParts:
    """The parts of some draws, where the KL of some sites is known already."""
    zeros = torch.zeros(len(x), device=x.device)
    observed: dict[str, Tensor] = {}
    kl: dict[str, Tensor] = {}
    how: dict[str, str] = {}
    for site in sample_sites(draws.model):
        name = site["name"]
        if site["is_observed"]:
            observed[name] = draws.per_datapoint(site, site["log_prob"]).mean(0)
        elif name in known:
            kl[name], how[name] = known[name]
        else:
            values, how[name] = kl_of_site(draws, name)
            kl[name] = values.mean(0)
    for site in sample_sites(draws.guide):
        name = site["name"]
        # An autoguide's base, or a factor: in the guide alone. What the guide is given, it does not draw.
        if isinstance(site["fn"], Unit) or (not site["is_observed"] and name not in draws.model):
            kl[name], how[name] = draws.per_datapoint(site, site["log_prob"]).mean(0), SAMPLED
    looked_up = () if lookup is None else (*lookup.choices, ADDRESS)
    return BoundParts(
        sum(observed.values(), zeros),
        sum((value for name, value in kl.items() if name in looked_up), zeros),
        sum((value for name, value in kl.items() if name not in looked_up), zeros),
        probs,
        observed,
        kl,
        how,
    )


def _without_lookup(draws: Draws, x: Tensor) -> Float[Tensor, "B S"]:
    """q(a | x) of a guide that draws no address: that of the address given, or of nothing to choose from."""
    site = draws.model.nodes.get(ADDRESS)
    given = None if site is None else given_address(site, draws.layout.nesting)
    return torch.ones(len(x), 1, device=x.device) if given is None else given.expand(len(x), -1)


def _combined(parts: Sequence[BoundParts], combine: Callable[[list[Tensor]], Tensor]) -> BoundParts:
    """One split of several, field by field and site by site; a site that is not there costs nothing."""
    sizes = sorted({part.address_probs.shape[-1] for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"site 'address': expected the same number of addresses in every run, got {sizes}")

    def by_site(fields: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for field in fields for name in field)
        absent = [torch.zeros_like(part.reconstruction) for part in parts]
        return {
            name: combine([field.get(name, zero) for field, zero in zip(fields, absent, strict=True)])
            for name in names
        }

    return BoundParts(
        combine([part.reconstruction for part in parts]),
        combine([part.kl_address for part in parts]),
        combine([part.kl_z for part in parts]),
        combine([part.address_probs for part in parts]),
        by_site([part.observed for part in parts]),
        by_site([part.kl for part in parts]),
        _least_exact([part.how for part in parts]),
    )


def _least_exact(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """How each KL was found; one of a site that is not always there is a mean over draws at best."""
    order = (EXACT, MEAN, SAMPLED)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: max((part.get(name, MEAN) for part in parts), key=order.index) for name in names}
