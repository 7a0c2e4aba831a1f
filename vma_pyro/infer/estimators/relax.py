"""RELAX: a critic of perturbed logits as the control variate, alone or beside the relaxed program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.whole import check_whole
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.relaxed_control import Pair, RelaxedControlELBO, RelaxedDraw, Temperature


class RelaxationCritic(nn.Module):
    r"""r(z): a layer of LeakyReLU units on the perturbed logits, zero at the start.

    Args:
        features: the number of logits of a datapoint, over all relaxed sites: one of a bit, S of a value of S.
            None: any number; more than `hidden` are averaged with their neighbours to so many first.
        hidden: number of units; 137 as in the paper's experiments.
    """

    def __init__(self, features: int | None = None, *, hidden: int = 137) -> None:
        super().__init__()
        check_whole("hidden", hidden)
        if features is not None:
            check_whole("features", features)
        first = nn.AdaptiveAvgPool1d(hidden) if features is None else nn.Identity()
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(first, nn.Linear(features or hidden, hidden), nn.LeakyReLU(), last)

    def forward(self, z: Float[Tensor, "K B F"], *args: Any, **kwargs: Any) -> Float[Tensor, "K B 1"]:
        """Judge z; the arguments of the programs are not looked at."""
        return self.network(z.to(next(self.parameters()).dtype))


@final
class RELAX(RelaxedControlELBO):
    r"""The evidence lower bound, with a learned function of perturbed logits as its control variate.

    .. math::
        \nabla_\phi = \big[ f(x) - c(\tilde z) \big] h + \nabla_\phi c(z) - \nabla_\phi c(\tilde z), \qquad
        c(z) = r(z) + \eta f(\mathrm{softmax}(z / \tau))

    (Grathwohl et al. 2018.) f, x, z and z~ are those of `REBAR`. With `reads_softly=False` c is
    the critic r alone: then the program is run once per draw, on values as they are, and any program will do.
    Unbiased for every critic, eta and tau, which follow the gradient of the squared gradient of the same draw.

    Args:
        num_particles: K, the number of draws.
        critic: r, a module from z [K, B, F] and the arguments of the programs to [K, B] or [K, B, 1]. F are the
            logits of all relaxed sites in the guide's order, site by site: one of a bit, S of a value of S; those
            of impossible values are 0. None: `RelaxationCritic()`.
        reads_softly: whether c has the program on weights in it, which must then be able to read them.
        site: name of the site, or names; None: all discrete sites.
        temperature: tau at the start.
        eta: at the start.
        batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: temperature not above 0; a program that cannot read weights; a critic of another shape; and see
            `RelaxedControlELBO`.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        critic: nn.Module | None = None,
        reads_softly: bool = True,
        site: str | Sequence[str] | None = None,
        temperature: float = 0.5,
        eta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, site=site, **options)
        if critic is not None and not isinstance(critic, nn.Module):
            raise ValueError(f"critic: expected an nn.Module, got {critic!r}")
        self.critic = RelaxationCritic() if critic is None else critic
        self.control = Temperature(temperature, eta) if reads_softly else None

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return the critic; eta and log tau where the program reads weights."""
        return {"critic": self.critic} | ({} if self.control is None else {"control": self.control})

    @property
    def _runs_softly(self) -> bool:
        return self.control is not None

    def _all_particles(self) -> int:
        return (3 if self._runs_softly else 1) * self.num_particles

    def _control(self, programs: Programs, drawn: RelaxedDraw) -> Pair:
        of_z, of_given = zip(*(site.features() for site in drawn.sites), strict=True)
        r, r_given = (self._judged(torch.cat(z, -1), programs) for z in (of_z, of_given))
        if self.control is None:
            return r, r_given
        c, c_given = self._of_program(programs, drawn, self.control)
        return r + c, r_given + c_given

    def _judged(self, z: Float[Tensor, "K B F"], programs: Programs) -> Float[Tensor, "K B"]:
        """Ask the critic."""
        args, kwargs = programs.as_given
        try:
            r = self.critic(z, *args, **kwargs)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"critic: expected to take z {list(z.shape)}, got an error ({line})") from error
        if r.shape not in (z.shape[:2], (*z.shape[:2], 1)):
            raise ValueError(f"critic: expected output {list(z.shape[:2])} of z, got {list(r.shape)}")
        return r.reshape(z.shape[:2]).to(z)
