"""Whether the gradient through a reparameterised value is that of log w.

A program that compares a draw z with a number (`torch.where(t < z, ...)`, a change of regime) has a log w that
jumps where the comparison turns. Its mean over z moves with the guide, but no draw's gradient says so: what
estimators that differentiate through draws find is the gradient of something else. Programs that compare or round
what they make of a draw are followed from one draw to others, see `own_derivative`; continuous ones (a unit with
a kink) pass, and those that do neither are run once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.checks import is_function_of
from vma_pyro.infer.engine.distributions import is_point
from vma_pyro.infer.engine.first_look import Known, is_recorded, undisturbed
from vma_pyro.infer.engine.handlers import Message, decide, is_open
from vma_pyro.infer.engine.hard_reads import Reads
from vma_pyro.infer.engine.own_derivative import Gap, Line, find_gap
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import run_both

LINES = 4  # one may miss the jump
LOOKED_AT = Known()


@not_compiled
def check_paths(programs: Programs) -> None:
    """Refuse a pair of programs, once, that jump in a draw through which gradients pass.

    Args:
        programs: with arguments that the guide has prepared.

    Raises:
        ValueError: log w moves otherwise than its gradient says.
    """
    known, key = LOOKED_AT.find(programs)
    if key in known or is_recorded():  # what is recorded is run as well, and looked at then
        return
    reads, gap = None, None
    # Whatever programs may raise here, the estimate itself says why.
    with suppress(Exception), undisturbed(programs.model, programs.guide), poutine.block():
        draws, reads = _look(programs)
        gap = _follow(programs, draws) if reads.found else None
    if reads is not None and reads.found and gap is not None:
        name, operation = reads.found
        raise ValueError(
            f"site '{name}': expected log w with its own derivative in its value, as gradients through draws "
            f"need, got {gap.moved:.3g} nats on the way to another draw where the gradient says "
            f"{gap.expected:.3g}: the program compares or rounds what it makes of it ({operation}); draw it as "
            "fn.has_rsample_(False), which has a score"
        )
    known.add(key)


class Draws(Messenger):
    """Keeps what a guide draws; what gradients pass through becomes the start of a graph.

    Args:
        given: values by name, which are taken in the place of draws.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self.given = given
        self.paths: dict[str, Tensor] = {}  # through which gradients pass to parameters
        self.others: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if not is_open(msg):
            return None
        name, fn = msg["name"], msg["fn"]
        if name in self.given:
            return decide(msg, self.given[name])
        value = handlers.draw(msg)
        passes = fn.has_rsample and value.requires_grad and not is_point(fn)
        if passes:
            value = value.detach().requires_grad_()
        (self.paths if passes else self.others)[name] = value
        return decide(msg, value)


class Comparisons(Reads):
    """Notes the first comparison or rounding of something made of a draw."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws
        self.found: tuple[str, str] | None = None  # the draw, and what was done

    def met(self, operation: str, read: Tensor, *, rounds: bool) -> None:
        """Look for a draw behind what is read."""
        if self.found or not read.requires_grad or not read.is_floating_point():
            return
        for name, value in self.draws.paths.items():
            if read is value or is_function_of(read, value):
                self.found = (name, operation)
                return


def _look(programs: Programs) -> tuple[Draws, Comparisons]:
    """Run both programs once, without particles."""
    draws = Draws({})
    reads = Comparisons(draws)
    with torch.enable_grad(), reads:
        _run(programs, draws)
    return draws, reads


def _follow(programs: Programs, draws: Draws) -> Gap | None:
    """Follow log w, summed over the datapoints, from these draws to others; all that is no path stays."""

    def log_w(at: Mapping[str, Tensor]) -> Tensor:
        guide, model = _run(programs, Draws({**draws.others, **at}))
        return torch.as_tensor(model.log_prob_sum() - guide.log_prob_sum())[None, None]

    paths = draws.paths.items()
    for _ in range(LINES):
        others = Draws(draws.others)
        with torch.enable_grad():
            _run(programs, others)
        lines = {name: Line(value.detach(), others.paths[name].detach(), _total) for name, value in paths}
        gap = find_gap(lines, log_w)
        if gap is not None:
            return gap
    return None


def _total(of_values: Tensor) -> Tensor:
    return of_values.sum()[None, None]


def _run(programs: Programs, draws: Draws) -> tuple[poutine.Trace, poutine.Trace]:
    return run_both(replace(programs, guide=draws(programs.guide)))
