"""Whether the gradient through a reparameterised value is that of log w.

A program that compares a draw z with a number (`torch.where(t < z, ...)`, a change of regime) has a log w that
jumps where the comparison turns. Its mean over z moves with the guide, but no draw's gradient says so: what
estimators that differentiate through draws find is the gradient of something else. The first estimate of a pair of
programs is watched; those that compare or round what they make of a draw are followed from one draw to others, see
`own_derivative`. Continuous ones (a unit with a kink) pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.distributions import elementary, is_location_scale, is_point
from vma_pyro.infer.engine.first_look import Known, is_recorded, undisturbed
from vma_pyro.infer.engine.handlers import Message, decide, is_drawn, is_open
from vma_pyro.infer.engine.hard_reads import Reads
from vma_pyro.infer.engine.own_derivative import Gap, Line, Lines, LogW, find_gap
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import WATCHES, run_both

T = TypeVar("T")
LINES = 4  # one may miss the jump
FOUND = Known()  # the first comparison of a draw in programs, if there is one
LOOKED_AT = Known()


def watched(programs: Programs, estimate: Callable[[], T]) -> T:
    """Estimate; refuse a pair of programs, the first time, that jump in a draw through which gradients pass.

    Args:
        programs: with arguments that the guide has prepared.
        estimate: makes their first runs.

    Raises:
        ValueError: log w moves otherwise than its gradient says.
    """
    # What is recorded is run as it is as well, and watched then; a loss that only runs compiled is not.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_recorded():
        return estimate()
    known, key = FOUND.find(programs)
    if key not in known:
        watch = PathWatch()
        WATCHES.append(watch)
        try:
            result = estimate()
        finally:
            WATCHES.remove(watch)
        known[key] = watch.found
    else:
        result = estimate()
    if known[key] is not None and LOOKED_AT.is_due(programs):
        _refuse_jumps(programs, *known[key])
    return result


@not_compiled
def _refuse_jumps(programs: Programs, name: str, operation: str) -> None:
    gap = None
    # Whatever programs may raise without particles, nothing can be said then.
    with suppress(Exception), undisturbed(programs.model, programs.guide), poutine.block():
        gap = _follow(programs, name)
    if gap is not None:
        raise ValueError(
            f"site '{name}': expected log w with its own derivative in its value, as gradients through draws "
            f"need, got {gap.moved:.3g} nats on the way to another draw where the gradient says "
            f"{gap.expected:.3g}: the program compares or rounds what it makes of it ({operation}); draw it as "
            "fn.has_rsample_(False), which has a score"
        )


class PathWatch(Messenger):
    """Notes the first comparison or rounding of something made of a draw through which gradients pass.

    Attributes:
        found: the site of the draw, and what was done; None: nothing.
    """

    def __init__(self) -> None:
        self.found: tuple[str, str] | None = None
        self.nodes: dict[Any, str] = {}  # of the graph, where the draws are
        self.reads = _Comparisons(self)

    def __enter__(self) -> Any:
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def _pyro_post_sample(self, msg: Message) -> None:
        if is_drawn(msg) and _passes(msg["fn"], msg["value"]) and torch.is_grad_enabled():
            self.nodes[msg["value"].view_as(msg["value"]).grad_fn.next_functions[0][0]] = msg["name"]


class _Comparisons(Reads):
    through_copies = True

    def __init__(self, watch: PathWatch) -> None:
        super().__init__()
        self.watch = watch

    def met(self, operation: str, read: Tensor, *, rounds: bool) -> None:
        """Look in autograd's graph for a draw behind what is read."""
        if self.watch.found or not self.watch.nodes or not read.requires_grad or not torch.is_grad_enabled():
            return
        waiting = [read.view_as(read).grad_fn]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node in self.watch.nodes:
                self.watch.found = (self.watch.nodes[node], operation)
                return
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]


class Draws(Messenger):
    """Keeps what a guide draws; what gradients pass through becomes the start of a graph.

    What is a function of other draws (`Delta`) is made anew from them.

    Args:
        given: values by name, which are taken in the place of draws.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self.given = given
        self.paths: dict[str, Tensor] = {}  # through which gradients pass to parameters
        self.others: dict[str, Tensor] = {}
        self.continuous: dict[str, Any] = {}  # distributions, in order

    def _pyro_sample(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        if not is_open(msg) or is_point(fn):
            return None
        if name in self.given:
            return decide(msg, self.given[name])
        value = handlers.draw(msg)
        if fn.has_rsample:
            self.continuous[name] = fn
        if _passes(fn, value):
            self.paths[name] = value.detach().requires_grad_()
            return decide(msg, self.paths[name])
        self.others[name] = value
        return decide(msg, value)


class _Redraw(Draws):
    """Draws what is not given from the same noise each time, as a function of what is given."""

    def _pyro_sample(self, msg: Message) -> None:
        if is_open(msg) and msg["name"] in self.given:
            decide(msg, self.given[msg["name"]])


def _passes(fn: Any, value: Tensor) -> bool:
    return bool(fn.has_rsample and value.requires_grad and not is_point(fn))


def _follow(programs: Programs, found: str) -> Gap | None:
    """Follow log w, summed over the datapoints, from some draws to others.

    All draws move, each by itself, and log w and the log q of values that have a score are followed; then the draw
    that is compared moves, and later ones move with it, as functions of it and of noise that stays.
    """
    draws = _draw(programs, {})
    scores = [name for name in draws.others if name not in draws.continuous]
    with_it = _after(draws, found)
    fixed = {n: v.detach() for n, v in {**draws.others, **draws.paths}.items() if n not in with_it}
    for _ in range(LINES):
        others = _draw(programs, draws.others).paths
        ends = {n: (v.detach(), others[n].detach()) for n, v in draws.paths.items() if n in others}
        lines = {name: Line(*both, _total) for name, both in ends.items()}
        turns: list[tuple[Lines, LogW]] = []
        if lines:
            turns.append((lines, _log_w(programs, Draws, draws.others)))
            if scores:
                turns.append((lines, _log_w(programs, Draws, draws.others, of=scores)))
        if with_it and found in lines:
            turns.append(({found: lines[found]}, _log_w(programs, _Redraw, fixed)))
        for turn in turns:
            gap = find_gap(*turn)
            if gap is not None:
                return gap
    return None


def _after(draws: Draws, found: str) -> set[str]:
    """Name the draws after one, where they are functions of it and of noise without parameters."""
    names = list(draws.continuous)
    later = names[names.index(found) + 1 :] if found in names else []
    return {name for name in later if is_location_scale(elementary(draws.continuous[name])[0])}


def _log_w(programs: Programs, kind: type[Draws], given: Mapping[str, Tensor], *, of: Sequence[str] = ()) -> LogW:
    """Make log w a function of some draws, or log q of the named sites."""

    def log_w(at: Mapping[str, Tensor]) -> Tensor:
        guide, model = _run(programs, kind({**given, **at}))
        if not of:
            return torch.as_tensor(model.log_prob_sum() - guide.log_prob_sum())[None, None]
        guide.compute_log_prob()
        sites: list[Any] = [guide.nodes[name] for name in of if name in guide.nodes]
        return torch.as_tensor(sum(site["log_prob_sum"] for site in sites))[None, None]

    return log_w


def _total(of_values: Tensor) -> Tensor:
    return of_values.sum()[None, None]


def _draw(programs: Programs, given: Mapping[str, Tensor]) -> Draws:
    draws = Draws(given)
    with torch.enable_grad():
        _run(programs, draws)
    return draws


def _run(programs: Programs, draws: Draws) -> tuple[poutine.Trace, poutine.Trace]:
    return run_both(replace(programs, guide=draws(programs.guide)))
