"""q(a | x, M): what is random before the address is summed over where that is possible, else averaged over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro.evaluation.checks import BATCH_PLATES, check_plate
from vma_pyro.evaluation.chunks import sample_chunks
from vma_pyro.evaluation.divergence import (
    EXACT,
    MEAN,
    closed_form,
    is_tabular,
    support_of,
    table_of,
)
from vma_pyro.evaluation.draws import (
    Draws,
    before,
    draw,
    draw_guide,
    ending_at,
    plate_dims,
    plates_of,
    trace_guide,
)
from vma_pyro.infer.engine.masks import without_mask
from vma_pyro.infer.engine.plates import Layout, Site, sample_sites

ADDRESS = "address"


class Lookup(NamedTuple):
    """What a guide draws up to the address.

    Attributes:
        choices: discrete sites before it, of a class, say, whose entries it then chooses from; one value for each
            datapoint. They are summed over.
        drawn: all other random sites before it. They are averaged over.
    """

    choices: tuple[str, ...]
    drawn: tuple[str, ...]


def lookup_of(guide_trace: poutine.Trace) -> Lookup | None:
    """What comes before the address; None if the guide draws none.

    Raises:
        ValueError: an address with no finite support, or with more than one value for each datapoint.
    """
    latent = [site for site in sample_sites(guide_trace) if not site["is_observed"]]
    names = [site["name"] for site in latent]
    if ADDRESS not in names:
        return None
    _check_address(guide_trace.nodes[ADDRESS])
    earlier = latent[: names.index(ADDRESS)]
    choices = tuple(site["name"] for site in earlier if _is_one_choice(site))
    return Lookup(choices, tuple(site["name"] for site in earlier if site["name"] not in choices))


def posterior_of_address(
    guide: Callable[..., Any], memory: Any, x: Tensor, *, num_samples: int
) -> Float[Tensor, "B S"]:
    """q(a | x, M), by `num_samples` runs of the guide where something is drawn before that is not summed over.

    Raises:
        ValueError: no site `address` that the guide draws.
    """
    guide = ending_at(ADDRESS, guide)
    trace = prune_subsample_sites(trace_guide(guide, memory, x))
    lookup, nesting = lookup_of(trace), plate_dims(trace)
    if lookup is None:
        raise ValueError(f"guide: expected a site 'address', found {trace.stochastic_nodes}")
    check_plate(trace.nodes[ADDRESS], len(x))
    if not lookup.choices and not lookup.drawn:
        return address_probs(trace, nesting, lookup)
    count = num_samples if lookup.drawn else 1
    total: Tensor | float = 0.0
    for k in sample_chunks(count, images=len(x)):
        found, _ = draw_guide(guide, memory, x, k, nesting, lookup.choices)
        total = total + k / count * address_probs(found, nesting, lookup)
    return torch.as_tensor(total)


def address_probs(guide_trace: poutine.Trace, nesting: int, lookup: Lookup) -> Float[Tensor, "B S"]:
    """q(a | x, M) of draws with all values of the choices."""
    leading = len(lookup.choices)
    layout = Layout(BATCH_PLATES, nesting, leading)
    site = guide_trace.nodes[ADDRESS]
    log_q = at_datapoints(site, table_of(site), nesting, leading)  # [*C, K, B, S]
    for name in lookup.choices:
        log_q = log_q + _log_choice(guide_trace.nodes[name], layout).unsqueeze(-1)
    if leading:
        log_q = log_q.flatten(0, leading - 1).logsumexp(0)
    # Where nothing else is drawn, all draws have the same distribution.
    return log_q.exp().mean(0) if lookup.drawn else log_q[0].exp()


def kl_of_lookup(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    lookup: Lookup,
    memory: Any,
    x: Tensor,
    *,
    num_samples: int,
    nesting: int,
) -> tuple[dict[str, tuple[Float[Tensor, " B"], str]], Float[Tensor, "B S"]]:
    r"""KL of each choice and of the address, and q(a | x, M) [B, S], with the choices c summed over.

    .. math:: \sum_{c} q(c \mid x) \sum_a q(a \mid c, x) \log \frac{q(a \mid c, x)}{p(a \mid c)}

    and likewise of each choice under those before it. What else is drawn before the address is averaged over.

    Returns:
        Site to its KL [B] in nats and how it was found, of those that have a closed form; and q(a | x, M).
    """
    draws = draw(
        model,
        guide,
        memory,
        x,
        num_samples=num_samples if lookup.drawn else 1,
        nesting=nesting,
        enumerated=lookup.choices,
    )
    found: dict[str, tuple[Tensor, str]] = {}
    log_weight = torch.zeros((), device=x.device)
    for name in (*lookup.choices, ADDRESS):
        if is_tabular(draws, name) and draws.prior_knows_no_more(name):
            averaged = before(draws.guide, name) & set(lookup.drawn)
            kl = _expected(draws, log_weight, closed_form(draws, name))
            found[name] = kl, MEAN if averaged else EXACT
        if name != ADDRESS:
            log_weight = log_weight + _log_choice(draws.guide.nodes[name], draws.layout)
    return found, address_probs(draws.guide, nesting, lookup)


def given_address(site: Site, nesting: int) -> Float[Tensor, "B S"] | None:
    """All probability on the address that a datapoint was given; None if it has no finite support."""
    support = support_of(site)
    if support is None:
        return None
    _check_address(site)
    event = len(site["fn"].event_shape)
    equal = support == site["value"]
    equal = equal.flatten(equal.dim() - event).all(-1) if event else equal
    values = equal.movedim(0, -1).to(torch.get_default_dtype())
    return at_datapoints(site, values, nesting, 0)[0]  # every draw was given the same


def at_datapoints(
    site: Site, table: Float[Tensor, "*any S"], nesting: int, leading: int
) -> Float[Tensor, "*C K B S"]:
    """A table of a site in the plate of the datapoints alone, without its other dimensions."""
    layout = Layout(BATCH_PLATES, nesting, leading + 1)
    missing = (1,) * (layout.rank - table.dim())
    kept = layout.per_datapoint(site, table.movedim(-1, 0).reshape(-1, *missing, *table.shape[:-1]))
    return kept.movedim(0, -1).contiguous()


def _expected(draws: Draws, log_weight: Tensor, kl: Float[Tensor, "*C K B"]) -> Float[Tensor, " B"]:
    """The mean over the draws of the sum over the choices."""
    weight = log_weight.exp()
    # What has no probability costs nothing, and infinity times zero is no number.
    terms = torch.where(weight == 0, 0.0, weight * kl)
    return terms.sum(list(range(draws.layout.leading))).mean(0)


def _log_choice(site: Site, layout: Layout) -> Float[Tensor, "*C K B"]:
    """log q of a choice at all of its values."""
    return layout.per_datapoint(site, without_mask(site["fn"]).log_prob(site["value"]))


def _is_one_choice(site: Site) -> bool:
    return support_of(site) is not None and not set(plates_of(site)) - set(BATCH_PLATES)


def _check_address(site: Site) -> None:
    if support_of(site) is None:
        raise ValueError(f"site 'address': expected a finite support, got {type(site['fn']).__name__}")
    further = sorted(set(plates_of(site)) - set(BATCH_PLATES))
    if further:
        raise ValueError(
            "site 'address': expected in the plate 'data' alone, as q(a | x) is one distribution of each image, "
            f"found also in {further}; give several addresses sites of their own"
        )
