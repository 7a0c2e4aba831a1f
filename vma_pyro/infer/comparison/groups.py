"""The parameters of two programs, in groups by what they parameterise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from vma_pyro.infer.engine.handlers import DetachValues
from vma_pyro.infer.engine.log_weights import draw_particles
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.plates import Program
from vma_pyro.infer.engine.programs import Handler, Programs

Groups = Mapping[str, Sequence[Tensor]]


def parameters_of(
    model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """All parameters by name: of modules, and of Pyro's parameter store as far as the programs use it."""
    found: dict[str, Tensor] = {}
    for prefix, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            found.update({f"{prefix}.{name}": p for name, p in program.named_parameters()})
    with torch.no_grad(), poutine.trace(param_only=True) as captured:
        programs = Programs(model, guide, args, kwargs).prepared()
        guide_trace = poutine.trace(guide).get_trace(*programs.args, **programs.kwargs)
        poutine.replay(model, trace=guide_trace)(*programs.args, **programs.kwargs)
    for name, site in captured.trace.nodes.items():
        if site["type"] == "param":
            value: Any = site["value"]
            found[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
    once: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in found.items():
        if parameter.requires_grad:
            once.setdefault(id(parameter), (name, parameter))
    return dict(once.values())


def parameter_groups(
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    batch_plates: Sequence[str] = ("data",),
    max_plate_nesting: int = 1,
) -> dict[str, list[Tensor]]:
    """Group the parameters by which log probabilities they are in.

    Returns:
        "discrete guide": parameters of log q of the sites that are not reparameterised, and of nothing else;
        "continuous guide": of log q of the others only; "model": of log p only; "shared": of several.
        Empty groups are left out.
    """
    kwargs = kwargs or {}
    parameters = list(parameters_of(model, guide, args, kwargs).values())

    def draw(handlers: Sequence[Handler]) -> Particles:
        return draw_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=1,
            batch_plates=batch_plates,
            max_plate_nesting=max_plate_nesting,
            handlers=handlers,
            pathwise=None,
        )

    particles = draw([DetachValues()])
    parts = {
        "discrete guide": particles.score,
        "continuous guide": particles.log_q_reparameterised,
        "model": particles.log_p,
    }
    reached = {name: _reached(part.sum(), parameters) for name, part in parts.items()}
    through_values = _reached(draw([]).log_weights.sum(), parameters)  # such as of a guide of points
    groups: dict[str, list[Tensor]] = {name: [] for name in (*parts, "shared")}
    for i, parameter in enumerate(parameters):
        names = [name for name in parts if reached[name][i]]
        if not names and through_values[i]:
            names = ["continuous guide"]
        if names:
            groups[names[0] if len(names) == 1 else "shared"].append(parameter)
    return {name: group for name, group in groups.items() if group}


def _reached(value: Tensor, parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters a value depends on."""
    if not value.requires_grad or not parameters:
        return [False] * len(parameters)
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True)
    return [g is not None for g in gradients]
