"""Gates: how a pathwise rule reaches the gradient through a reparameterised value."""

from __future__ import annotations

from collections.abc import Collection

import torch
from pyro import poutine
from pyro.distributions.util import detach
from torch import Tensor

from vma_pyro.infer.checks import check_nothing_depends_on, is_reparameterised, name_of
from vma_pyro.infer.pathwise import PathwiseRule, iwae
from vma_pyro.infer.plates import Layout, Site, sample_sites


class Gate:
    """The identity on a reparameterised value that multiplies the gradient through it by its rule's factor.

    The factor depends on the weights of all particles, which are known only after the model has run: it is set
    with `open`, before the backward pass.

    Args:
        site: of the guide.
        rule: its pathwise rule.
        layout: where the site's tensors hold particles and datapoints.
        power: s, broadcasts to the site's log probability.
    """

    def __init__(self, site: Site, rule: PathwiseRule, layout: Layout, power: Tensor) -> None:
        # Not the site itself: it holds the value, whose hook holds this gate, and a circle through autograd's
        # graph is never collected.
        self.site = {key: site[key] for key in ("name", "cond_indep_stack")}
        self.event_dim: int = site["fn"].event_dim
        self.rule, self.layout, self.power = rule, layout, power
        self.factor: Tensor | None = None

    def pass_through(self, value: Tensor) -> Tensor:
        """The value, with the gate in its backward pass."""
        value = value.view_as(value)
        value.register_hook(self._multiply)
        return value

    def open(self, v: Tensor) -> None:
        """Set the factor from normalised weights [*S, K, *batch]."""
        self.factor = self.rule.factor(self.layout.spread(self.site, v), self.power)

    def _multiply(self, gradient: Tensor) -> Tensor:
        assert self.factor is not None, "open_gates comes before the backward pass"
        factor = self.factor.reshape(self.factor.shape + (1,) * self.event_dim)
        return (gradient * factor).reshape(gradient.shape)


def set_gates(
    guide_trace: poutine.Trace, layout: Layout, default: PathwiseRule | None, chosen: Collection[str]
) -> tuple[Gate, ...]:
    """Check what the sites ask for, and put reparameterised values under a detached rule behind gates."""
    gates = []
    sites = list(sample_sites(guide_trace))
    for position, site in enumerate(sites):
        if site["is_observed"] or site["name"] in chosen:
            continue
        asked = site["infer"].get("estimator")
        if is_reparameterised(site):
            if asked is not None and not isinstance(asked, PathwiseRule):
                raise ValueError(
                    f"site '{site['name']}': expected a pathwise rule (iwae, dreg, stl) as it is reparameterised, "
                    f"got the score baseline {name_of(asked)}"
                )
            rule = iwae if default is None else asked or default
            if rule.detached and site["value"].requires_grad:
                check_nothing_depends_on(site, sites[position + 1 :], rule)
                gates.append(_gate(guide_trace, site, rule, layout))
        elif isinstance(asked, PathwiseRule):
            raise ValueError(
                f"site '{site['name']}': expected a score baseline, as it is not reparameterised, "
                f"got the pathwise rule '{asked.name}'"
            )
    return tuple(gates)


def _gate(guide_trace: poutine.Trace, site: Site, rule: PathwiseRule, layout: Layout) -> Gate:
    """Put the site's value behind a gate, and hold the parameters of its log q fixed."""
    gate = Gate(site, rule, layout, power_of(site, layout))
    site["value"] = gate.pass_through(site["value"])
    site["fn"] = detach(site["fn"])
    for stale in ("log_prob", "log_prob_sum", "unscaled_log_prob", "score_parts"):
        site.pop(stale, None)
    try:
        guide_trace.compute_score_parts()
    except KeyError as error:  # a flow that knows the density of its own draws only
        raise ValueError(
            f"site '{site['name']}': expected a density at any value under the rule '{rule.name}', "
            f"got {type(site['fn']).__name__} without an inverse; use iwae there"
        ) from error
    return gate


def power_of(site: Site, layout: Layout) -> Tensor:
    """The power to which q stands in w at each element of a site: scale (but for subsampling) times mask."""
    power = torch.as_tensor(site["scale"], dtype=site["log_prob"].dtype, device=site["log_prob"].device)
    power = power / layout.subsampling_scale(site)
    return power if site["mask"] is None else power * site["mask"]
