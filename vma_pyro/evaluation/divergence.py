"""KL divergences of single sites: in closed form over a finite support, else by the draws."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Categorical

from vma_pyro.evaluation.draws import Draws, plates_of
from vma_pyro.infer.engine.masks import without_mask
from vma_pyro.infer.engine.plates import Site

# How a KL was found: without any draw; in closed form given the draws of what comes before; from the draws of the
# site itself.
EXACT, MEAN, SAMPLED = "exact", "mean over draws", "sampled"


def kl_of_site(draws: Draws, name: str) -> tuple[Float[Tensor, "K B"], str]:
    r"""E_q [log q(s | before) - log p(s | before)] of a latent site s at each draw, and how it was found.

    Masks and scales of both programs count as in the bound. In closed form only where the model's distribution
    cannot depend on s itself, or on what the guide draws after it.
    """
    if is_tabular(draws, name) and draws.prior_knows_no_more(name):
        free = not draws.depends_on_a_draw(name) and not draws.prior_depends_on_a_draw(name)
        return closed_form(draws, name, at_one_draw=free), EXACT if free else MEAN
    q, p = draws.guide.nodes[name], draws.model.nodes[name]
    return draws.per_datapoint(q, q["log_prob"]) - draws.per_datapoint(p, p["log_prob"]), SAMPLED


def is_tabular(draws: Draws, name: str) -> bool:
    """Whether a site's values can be listed, and are one for each element of the same plates in both programs."""
    q: Site = draws.guide.nodes[name]
    p: Site = draws.model.nodes[name]
    return (
        support_of(q) is not None and q["fn"].event_shape == p["fn"].event_shape and plates_of(q) == plates_of(p)
    )


def closed_form(draws: Draws, name: str, *, at_one_draw: bool = False) -> Float[Tensor, "*C K B"]:
    """Sum over the values of a site of q (log q - log p), as the logs stand in the bound.

    Args:
        draws: of both programs.
        name: of a tabular site.
        at_one_draw: whether the first draw speaks for all.
    """
    q, p = draws.guide.nodes[name], draws.model.nodes[name]
    own, log_q, log_p = table_of(q), _in_bound(q, q), _in_bound(p, q)
    if at_one_draw:
        own, log_q, log_p = (first_draw(draws, table) for table in (own, log_q, log_p))
    return draws.per_datapoint(q, divergence(own.exp(), log_q - log_p))


def first_draw(draws: Draws, table: Float[Tensor, "*any S"]) -> Float[Tensor, "*one S"]:
    """A table [*enumerated, K, plates, S] at one draw; what has no dimension of draws is as it was."""
    dim = table.dim() - 2 - draws.layout.nesting
    return table.narrow(dim, 0, 1) if dim >= 0 else table


def divergence(q: Float[Tensor, "*any S"], log_ratio: Float[Tensor, "*any S"]) -> Float[Tensor, "*any"]:
    """Sum of q (log q - log p) over the last dimension; what has no probability costs nothing."""
    return (q * log_ratio).masked_fill(q == 0, 0.0).sum(-1)


def table_of(site: Site) -> Float[Tensor, "*batch S"]:
    """Log probability of drawing each value of a site with finite support; no mask changes that."""
    fn = without_mask(site["fn"])
    return _table(fn, fn)


def support_of(site: Site) -> Tensor | None:
    """All values of a site [S, 1, ..., *event]; None where they cannot be listed."""
    fn = without_mask(site["fn"])
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        support: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError:  # binomials with different numbers of trials
        return None
    return support


def _table(fn: Any, of: Any) -> Float[Tensor, "*batch S"]:
    """log_prob of each value that another distribution may take."""
    if isinstance(fn, Categorical) and isinstance(of, Categorical) and fn.logits.shape[-1] == of.logits.shape[-1]:
        return fn.logits.log_softmax(-1)
    support = of.enumerate_support(expand=False)
    dims = max(len(fn.batch_shape), len(of.batch_shape))
    values = support.reshape(len(support), *(1 for _ in range(dims)), *of.event_shape)
    return fn.log_prob(values).movedim(0, -1).contiguous()


def _in_bound(site: Site, of: Site) -> Float[Tensor, "*batch S"]:
    """The site's log probability of each value of the guide's, with its mask and scale."""
    mask, scale = (
        mark.unsqueeze(-1) if isinstance(mark, Tensor) else mark for mark in (site["mask"], site["scale"])
    )
    return scale_and_mask(_table(site["fn"], without_mask(of["fn"])), scale, mask)
