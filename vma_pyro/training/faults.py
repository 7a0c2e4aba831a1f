"""What is wrong with model and guide that a loss alone does not tell: they are run once more and looked at.

The site at fault where a loss or a gradient is no number; parameters that are nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions.utils import lazy_property

from vma_pyro.evaluation import undisturbed
from vma_pyro.infer.engine.distributions import innermost

TRIES = 5  # the noise that led to it is lost on a GPU


def find_fault(
    model: Any, guide: Any, memory: Any, x: Tensor, *, parameters: Sequence[nn.Parameter], noise: Tensor | None
) -> str | None:
    """Find the first site whose parameters, log probability or gradient is no number, in one line; else None.

    Args:
        model, guide: programs of (memory, x).
        memory, x: those of the update that failed.
        parameters: whose gradients are looked at.
        noise: state of the random stream before that update; None draws others.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for seed in range(TRIES):
            torch.manual_seed(seed)
            if noise is not None and seed == 0:
                torch.set_rng_state(noise)
            found = _first(model, guide, memory, x, parameters)
            if found is not None:
                return found
    return None


def _first(model: Any, guide: Any, memory: Any, x: Tensor, parameters: Sequence[nn.Parameter]) -> str | None:
    watch = Watch()
    try:
        with watch:
            trace = poutine.trace(guide).get_trace(memory, x)
            watch.program = "model"
            poutine.replay(model, trace=trace)(memory, x)
    except (RuntimeError, ValueError):  # what follows from NaN; the watch has seen where it began
        if watch.found is None:
            raise
    if watch.found is not None:
        return watch.found
    for where, log_prob in watch.log_probs.items():
        if not log_prob.requires_grad:
            continue
        gradients = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True, retain_graph=True)
        if any(g is not None and not bool(g.isfinite().all()) for g in gradients):
            return f"{where}: expected a gradient of its log probability, got NaN or infinity"
    return None


def check_params(model: Any, guide: Any, memory: Any, x: Tensor, *, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse `pyro.param` statements whose parameters belong to no module.

    Pyro keeps them in a store of its own: they would be neither trained nor saved.

    Args:
        model, guide: programs of (memory, x).
        memory, x: of one update.
        parameters: of model and guide as modules.

    Raises:
        ValueError: such a parameter.
    """
    own = {id(parameter) for parameter in parameters}
    with pyro.get_param_store().scope(), undisturbed(model, guide, seed=0):
        for program in (guide, model):
            for name, node in poutine.trace(program, param_only=True).get_trace(memory, x).nodes.items():
                if node["type"] != "param":
                    continue
                behind = getattr(node["value"], "unconstrained", lambda node=node: node["value"])()
                if id(behind) not in own:
                    raise ValueError(
                        f"pyro.param '{name}': expected parameters of the modules model and guide, got one that "
                        "would be neither trained nor saved; make it an nn.Parameter or a PyroParam of the module"
                    )


class Watch(Messenger):
    """Looks at every sample statement, before and after it draws.

    Attributes:
        program: whose statements they are.
        found: the first that is no number, in one line.
        log_probs: of the others, by site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.program = "guide"
        self.found: str | None = None
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if self.found is None and not site_is_subsample(msg):
            for name, value in parameters_of(msg["fn"]):
                if bool(value.isnan().any()):
                    kind = type(innermost(msg["fn"])).__name__
                    self.found = f"{self._where(msg)}: expected parameters of {kind}, got NaN in {name}"
                    return

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.found is not None or site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"])
        if isinstance(msg["mask"], Tensor):
            log_prob = torch.where(msg["mask"], log_prob, log_prob.new_zeros(()))
        elif msg["mask"] is False:
            return
        bad = ~log_prob.isfinite()
        if bool(bad.any()):
            first = log_prob[bad][0].item()
            got = {float("inf"): "infinity", float("-inf"): "minus infinity"}.get(first, "NaN")
            kind = type(innermost(msg["fn"])).__name__
            self.found = (
                f"{self._where(msg)}: expected a log probability, got {got} for {int(bad.sum())} of {bad.numel()} "
                f"values, by the {self.program}'s {kind}"
            )
        self.log_probs[self._where(msg)] = log_prob

    def _where(self, msg: Any) -> str:
        return f"site '{msg['name']}'"


def parameters_of(fn: Any) -> list[tuple[str, Tensor]]:
    """List what a distribution was made of."""
    fn = innermost(fn)
    # Some are computed from others when asked for: only those that are there.
    given = [
        name
        for name in getattr(fn, "arg_constraints", {})
        if name in vars(fn) or not isinstance(getattr(type(fn), name, None), lazy_property)
    ]
    values = [(name, getattr(fn, name, None)) for name in given]
    return [(name, value) for name, value in values if isinstance(value, Tensor) and value.is_floating_point()]
