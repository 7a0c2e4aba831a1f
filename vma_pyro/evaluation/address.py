"""The distribution of the address; where other discrete choices come before it, summed over them exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from vma_pyro.evaluation.estimates import distribution_at
from vma_pyro.infer.log_weights import run


def choices_before(trace: poutine.Trace) -> list[str]:
    """Names of the discrete sites before `address`: of a class, say, whose entries the address then chooses from.

    Raises:
        ValueError: no site `address`.
    """
    sites = list(trace.stochastic_nodes)
    if "address" not in sites:
        raise ValueError(f"guide: expected a site 'address', found {sites}")
    before = sites[: sites.index("address")]
    return [site for site in before if getattr(distribution_at(trace, site), "has_enumerate_support", False)]


def posterior_of_address(guide: Callable[..., Any], memory: Any, x: Tensor) -> Float[Tensor, "B S"]:
    """Logits of q(a | x, M).

    Raises:
        ValueError: no site `address`.
    """
    trace = run(guide, (memory, x), {})
    choices = choices_before(trace)
    if choices:
        trace = _enumerated(guide, choices, memory, x)
    return _joint(trace, choices).flatten(0, -3).logsumexp(0)


def kl_of_address(
    model: Callable[..., Any], guide: Callable[..., Any], choices: Sequence[str], memory: Any, x: Tensor
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B S"]]:
    r"""KL(q(c, a | x, M) || p(c, a | M)) [B] in nats and q(a | x, M) [B, S], the choices c before a enumerated.

    .. math:: \sum_{c, a} q(c, a \mid x) \log \frac{q(c, a \mid x)}{p(c, a)}

    Args:
        model, guide: programs of (memory, x).
        choices: names of c.
        memory, x: as everywhere.
    """
    guide_trace = _enumerated(guide, choices, memory, x)
    model_trace = run(poutine.replay(model, trace=guide_trace), (memory, x), {})
    log_q = _joint(guide_trace, choices).flatten(0, -3)  # [C, B, S]
    log_p = _joint(model_trace, choices).flatten(0, -3)
    return divergence(log_q, log_p).sum(0), log_q.logsumexp(0).exp()


def divergence(log_q: Float[Tensor, "*any S"], log_p: Float[Tensor, "*any S"]) -> Float[Tensor, "*any"]:
    """Sum of q (log q - log p) over the last dimension; what has no probability costs nothing."""
    q = log_q.exp()
    return (q * (log_q - log_p)).masked_fill(q == 0, 0.0).sum(-1)


def _enumerated(guide: Callable[..., Any], choices: Sequence[str], memory: Any, x: Tensor) -> poutine.Trace:
    """A run of the guide with all values of the choices side by side, in dimensions left of the plate's."""

    def how(site: Any) -> Any:
        return {"enumerate": "parallel"} if site["name"] in choices else {}

    every = poutine.enum(poutine.infer_config(guide, config_fn=how), first_available_dim=-2)
    return run(every, (memory, x), {})


def _joint(trace: poutine.Trace, choices: Sequence[str]) -> Float[Tensor, "*C B S"]:
    """Log probability of the choices and of each address."""
    total = distribution_at(trace, "address").logits.log_softmax(-1)
    for site in choices:
        total = total + distribution_at(trace, site).log_prob(trace.nodes[site]["value"]).unsqueeze(-1)
    return total if total.dim() > 2 else total.unsqueeze(0)
