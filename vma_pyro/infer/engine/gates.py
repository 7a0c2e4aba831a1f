"""Gates, by which a pathwise rule reaches the gradient through a reparameterised value."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import detach
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine.checks import check_nothing_depends_on, is_reparameterised
from vma_pyro.infer.engine.distributions import is_point
from vma_pyro.infer.engine.handlers import is_drawn
from vma_pyro.infer.engine.masks import mask_of, without_mask
from vma_pyro.infer.engine.options import shown
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.plates import Layout, Site, sample_sites


class Gate:
    """The identity on a reparameterised value; it multiplies the gradient by the factor of the site's rule.

    The factor depends on the weights of all particles, which are known only after the model has run: it is set
    with `open`, before the backward pass.
    """

    def __init__(self, rule: PathwiseRule) -> None:
        self.rule = rule
        self.factor: Tensor | None = None

    @not_compiled
    def pass_through(self, value: Tensor) -> Tensor:
        """Return the value, with the gate in its backward pass."""
        value = value.view_as(value)
        value.register_hook(self._multiply)
        return value

    def place(self, site: Site, layout: Layout) -> None:
        """Note where the site's tensors hold particles and datapoints, and to what power q stands in w there."""
        # The site itself holds the value, whose hook holds this gate: a circle through autograd's graph is never
        # collected.
        self.site = {key: site[key] for key in ("name", "cond_indep_stack")}
        self.layout = layout
        self.power, self.inner = power_of(site, layout)  # [*batch, *inner]
        self.padding = site["fn"].event_dim - self.inner

    def open(self, v: Tensor) -> None:
        """Set the factor from normalised weights [*S, K, *batch]."""
        spread = self.layout.spread(self.site, v)
        factor = self.rule.factor(spread.reshape(spread.shape + (1,) * self.inner), self.power)
        self.factor = factor.reshape(factor.shape + (1,) * self.padding)

    def _multiply(self, gradient: Tensor) -> Tensor:
        assert self.factor is not None, "open_gates comes before the backward pass"
        return (gradient * self.factor).reshape(gradient.shape)


class GateValues(Messenger):
    """Put the reparameterised values of a guide behind gates as they are drawn, where their rule detaches.

    Whatever the guide makes of a value then lies behind its gate as well. A `Delta` draws nothing: it has no gate,
    nor has a site in `enumerated`. Sites that name no rule have the `default`.
    """

    def __init__(self, default: PathwiseRule, enumerated: Collection[str]) -> None:
        self.default, self.enumerated = default, enumerated
        self.gates: dict[str, tuple[Gate, Tensor]] = {}  # and the value behind it

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_drawn(msg) or msg["name"] in self.enumerated or not msg["fn"].has_rsample or is_point(msg["fn"]):
            return
        asked = msg["infer"].get("estimator")
        rule = asked if isinstance(asked, PathwiseRule) else self.default
        if rule.detached and msg["value"].requires_grad:
            gate = Gate(rule)
            msg["value"] = gate.pass_through(msg["value"])
            self.gates[msg["name"]] = (gate, msg["value"])


def set_gates(guide_trace: poutine.Trace, layout: Layout, values: GateValues) -> tuple[Gate, ...]:
    """Check what the sites ask for, and hold the parameters of log q fixed at the values behind gates."""
    gates = []
    sites = list(sample_sites(guide_trace))
    for gate, _ in values.gates.values():
        gate.factor = torch.ones(())  # the checks below look for paths through them
    for position, site in enumerate(sites):
        if site["is_observed"] or site["name"] in values.enumerated:
            continue
        smooth = is_reparameterised(site)
        _check_kind(site, smooth)
        if site["name"] in values.gates:
            gate, site["value"] = values.gates[site["name"]]
            if smooth:
                check_nothing_depends_on(site, sites[position + 1 :], gate.rule)
                _hold_fixed(guide_trace, site, gate.rule)
            else:  # partly reparameterised (a rejection sampler): its score stays, and so does its path
                gate.rule = iwae
            gate.place(site, layout)
            gates.append(gate)
    for gate in gates:
        gate.factor = None
    return tuple(gates)


def _check_kind(site: Site, smooth: bool) -> None:
    """Refuse a score baseline at a reparameterised site, and a pathwise rule at any other."""
    asked = site["infer"].get("estimator")
    if asked is None or isinstance(asked, PathwiseRule) == smooth:
        return
    if smooth:
        raise ValueError(
            f"site '{site['name']}': expected a pathwise rule (iwae, dreg, stl) as it is reparameterised, "
            f"got the score baseline {shown(asked)}"
        )
    raise ValueError(
        f"site '{site['name']}': expected a score baseline, as it is not reparameterised, "
        f"got the pathwise rule '{asked.name}'"
    )


def _hold_fixed(guide_trace: poutine.Trace, site: Site, rule: PathwiseRule) -> None:
    """Hold the parameters of a site's log q fixed."""
    site["fn"] = detach(site["fn"])
    for stale in ("log_prob", "log_prob_sum", "unscaled_log_prob", "score_parts"):
        site.pop(stale, None)
    try:
        guide_trace.compute_score_parts()
        if _may_hide_parameters(site["fn"]) and site["fn"].log_prob(site["value"].detach()).requires_grad:
            raise ValueError(
                f"site '{site['name']}': expected a log q whose parameters can be held fixed under the rule "
                f"'{rule.name}', but one is reached through a function and still has a gradient; use iwae there"
            )
    except (KeyError, NotImplementedError) as error:  # a flow that knows the density of its own draws only
        raise ValueError(
            f"site '{site['name']}': expected a density at any value under the rule '{rule.name}', "
            f"got {type(site['fn']).__name__} without an inverse; use iwae there"
        ) from error


def _may_hide_parameters(fn: Any) -> bool:
    """Tell whether a distribution holds more than its own tensors, which are surely detached."""
    fn = without_mask(fn)
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return hasattr(fn, "transforms") or not type(fn).__module__.startswith(("torch.", "pyro.distributions."))


def power_of(site: Site, layout: Layout) -> tuple[Tensor, int]:
    """Compute the power to which q stands in w at each element of a site: scale (but for subsampling) times mask.

    It broadcasts to [*batch, *inner]; returns also the number of inner dimensions, of masks within an event.
    """
    power = torch.as_tensor(site["scale"], dtype=site["log_prob"].dtype, device=site["log_prob"].device)
    power = power / layout.subsampling_scale(site)
    mask = mask_of(site)
    power = power.reshape(power.shape + (1,) * mask.inner)
    return (power if mask.values is True else power * mask.values), mask.inner
