"""A check that Pyro's SVI trains every parameter that has a gradient.

SVI steps only what makes param statements while the loss is computed: other parameters keep their values for ever,
without a sign of it in the loss.
"""

from __future__ import annotations

from typing import Any

import pyro
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER as DIVIDER
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn


def check_svi_trains(model: Any, guide: Any) -> None:
    """Refuse a caller that is SVI and would not train a parameter that has a gradient."""
    seen = _collected()
    if seen is None:
        return
    for program in (model, guide):
        if not isinstance(program, nn.Module):
            continue
        for name, parameter in program.named_parameters():
            if parameter.requires_grad and parameter.grad is not None and id(parameter) not in seen:
                raise ValueError(_why(name, program))


def _collected() -> set[int] | None:
    """Collect the identities of the parameters that a param-only trace around us has seen; None without one."""
    for handler in _PYRO_STACK:
        if isinstance(handler, TraceMessenger) and handler.param_only:
            values: list[Any] = [site["value"] for site in handler.trace.nodes.values()]
            return {id(v.unconstrained() if hasattr(v, "unconstrained") else v) for v in values}
    return None


def _why(name: str, program: nn.Module) -> str:
    if pyro.settings.get("module_local_params"):
        return (
            f"module_local_params: expected False under pyro.infer.SVI, which would not train '{name}' "
            f"({type(program).__name__}), got True; set it with pyro.settings.set, or train elbo(model, "
            "guide).parameters() with an optimizer of torch"
        )
    expected = f"parameter '{name}': expected in Pyro's parameter store, where pyro.infer.SVI trains it, found"
    # Pyro joins the names of a PyroModule and a plain module in it with a divider of its own.
    stored = [known.replace(DIVIDER, ".") for known in pyro.get_param_store()]
    if any(known == name or known.endswith(f".{name}") for known in stored):
        return (
            f"{expected} that of an earlier model under its name; call pyro.clear_param_store() before a new model"
        )
    made = type(program).__name__
    return f"{expected} none of its name; make {made} a PyroModule, or register it with pyro.module"
