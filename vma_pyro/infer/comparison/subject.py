"""The programs and data on which estimators are compared: their parameters, sites, weights and gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vma_pyro.infer.comparison.groups import Groups, group_parameters
from vma_pyro.infer.comparison.sites import find_sites
from vma_pyro.infer.engine.first_look import PlateNesting
from vma_pyro.infer.engine.log_weights import draw
from vma_pyro.infer.engine.programs import Programs


class Subject:
    """Two programs and their data.

    Args:
        programs: the programs with their arguments, not prepared.
        batch_plates: plates whose elements are the datapoints; none: the whole program is one.
        groups: parameters by name of group; None: `parameter_groups`.

    Attributes:
        plate_options: the plates, as arguments for an estimator of these programs.
        sites: the guide's latent sites.
    """

    def __init__(self, programs: Programs, batch_plates: Sequence[str], groups: Groups | None = None) -> None:
        self.programs = programs
        self.plate_options: dict[str, Any] = {
            "batch_plates": tuple(batch_plates),
            "max_plate_nesting": PlateNesting()(programs),
        }
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
        found: Sequence[Tensor | None] = [None] * len(self.parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
