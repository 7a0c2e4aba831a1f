"""The programs and data on which estimators are compared: parameters in groups, sites, weights and gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from vma_pyro.infer.comparison.sites import find_sites
from vma_pyro.infer.engine.first_look import PlateNesting
from vma_pyro.infer.engine.handlers import DetachValues
from vma_pyro.infer.engine.log_weights import draw
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Handler, Programs

Groups = Mapping[str, Sequence[Tensor]]


def parameter_groups(
    model: PyroProgram,
    guide: PyroProgram,
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
    programs = Programs(model, guide, args, kwargs or {})
    return group_parameters(programs, batch_plates=batch_plates, max_plate_nesting=max_plate_nesting)


def group_parameters(programs: Programs, **plates: Any) -> dict[str, list[Tensor]]:
    """Group the parameters of programs with their arguments; the plates are those of `draw`."""
    parameters = find_parameters(programs)
    programs = programs.prepared()

    def particles_under(*handlers: Handler) -> Particles:
        return draw(programs, num_particles=1, handlers=handlers, pathwise=None, **plates)

    particles = particles_under(DetachValues())
    parts = {
        "discrete guide": particles.score,
        "continuous guide": particles.log_q_reparameterised,
        "model": particles.log_p,
    }
    reached = {name: _reached(part.sum(), parameters) for name, part in parts.items()}
    through_values = _reached(particles_under().log_weights.sum(), parameters)  # such as of a guide of points
    groups: dict[str, list[Tensor]] = {name: [] for name in (*parts, "shared")}
    for i, parameter in enumerate(parameters):
        names = [name for name in parts if reached[name][i]]
        if not names and through_values[i]:
            names = ["continuous guide"]
        if names:
            groups[names[0] if len(names) == 1 else "shared"].append(parameter)
    return {name: group for name, group in groups.items() if group}


def find_parameters(programs: Programs) -> list[Tensor]:
    """Find all parameters once: of modules, and of Pyro's parameter store as far as the programs use it."""
    found: list[Tensor] = []
    for program in (programs.model, programs.guide):
        if isinstance(program, nn.Module):
            found += program.parameters()
    with torch.no_grad(), poutine.trace(param_only=True) as captured:
        programs = programs.prepared()
        guide_trace = poutine.trace(programs.guide).get_trace(*programs.args, **programs.kwargs)
        poutine.replay(programs.model, trace=guide_trace)(*programs.args, **programs.kwargs)
    for site in captured.trace.nodes.values():
        if site["type"] == "param":
            value: Any = site["value"]
            found.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
    return list({id(parameter): parameter for parameter in found if parameter.requires_grad}.values())


def _reached(value: Tensor, parameters: Sequence[Tensor]) -> list[bool]:
    """Tell on which parameters a value depends."""
    if not value.requires_grad or not parameters:
        return [False] * len(parameters)
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True)
    return [g is not None for g in gradients]


class Subject:
    """Two programs and their data, with their parameters in `groups` (None: `parameter_groups`)."""

    def __init__(self, programs: Programs, batch_plates: Sequence[str], groups: Groups | None = None) -> None:
        self.programs = programs
        nesting = PlateNesting()(programs)
        # Arguments for an estimator of these programs.
        self.plate_options: dict[str, Any] = {"batch_plates": tuple(batch_plates), "max_plate_nesting": nesting}
        self.groups = groups or group_parameters(programs, **self.plate_options)
        self.parameters = [p for group in self.groups.values() for p in group]
        if not self.parameters:
            raise ValueError("groups: expected parameters that require a gradient, found none")
        self.sites = find_sites(programs, batch_plates)

    @functools.cached_property
    def datapoints(self) -> int:
        """The number of datapoints, B."""
        return self.weights(1).shape[1]

    def weights(self, num_particles: int, *, vectorize: bool = True) -> Tensor:
        """Draw log w [K, B]."""
        options = {"num_particles": num_particles, "vectorize": vectorize, "pathwise": None, **self.plate_options}
        with torch.no_grad():
            return draw(self.programs.prepared(), **options).log_weights

    def gradients(self, elbo: Any) -> list[Tensor]:
        """Draw the gradient in each of the parameters; zeros in those that the loss does not have."""
        loss = self.programs.loss(elbo)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
