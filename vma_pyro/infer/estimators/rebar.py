"""REBAR: the program itself, on relaxed values, as the control variate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import nn

from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.relaxed_control import Pair, RelaxedControlELBO, RelaxedDraw, Temperature


@final
class REBAR(RelaxedControlELBO):
    r"""The evidence lower bound, with the program on relaxed values as its control variate.

    .. math::
        \nabla_\phi = \big[ f(x) - \eta f(\sigma(\tilde z)) \big] h
                      + \eta \nabla_\phi f(\sigma(z)) - \eta \nabla_\phi f(\sigma(\tilde z)), \qquad
        \sigma(z) = \mathrm{softmax}(z / \tau)

    (Tucker et al. 2017.) f = log w, z = log q + Gumbel
    noise, x the value where it is largest, z~ drawn like z given x; see `RelaxedControlELBO`. A draw is one run of
    the program on values and two on weights, whatever the number of sites; all three share the noise of
    reparameterised sites, which must be of a location-scale family. Unbiased for any eta and tau, which are
    learned: they follow the gradient of the squared gradient of the same draw.

    The program must be able to read weights [..., S] in the place of integers, see `RelaxedELBO`; a bit must be
    read as a number.

    Args:
        num_particles: K, the number of draws.
        site: name of the site, or names; None: all discrete sites.
        temperature: tau at the start.
        eta: at the start; with 0 it is the plain score estimator.
        batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: temperature not above 0; a program that cannot read weights, or whose gradient in them is not
            the derivative of f; and see `RelaxedControlELBO`.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        site: str | Sequence[str] | None = None,
        temperature: float = 0.5,
        eta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, site=site, **options)
        self.control = Temperature(temperature, eta)

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return eta and log tau."""
        return {"control": self.control}

    def _all_particles(self) -> int:
        return 3 * self.num_particles

    def _control(self, programs: Programs, drawn: RelaxedDraw) -> Pair:
        return self._of_program(programs, drawn, self.control)
