"""A model and a guide with the arguments of both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro._system.arguments import Arguments
from vma_pyro.infer.engine.plates import PyroProgram

Handler = Callable[[PyroProgram], PyroProgram]


@dataclass(frozen=True)
class Programs:
    """Two programs that are run on the same arguments.

    A guide may have a method `prepare`. At the start of an estimate `prepare(*args, **kwargs)` is called once, and
    returns the positional arguments of all runs of both programs (or `Arguments`, where some go by name). It
    computes what is costly and the same in every run, with gradients where the estimate takes them. What it
    returns must not depend on observed data, other than by passing them on: a dream of wake-sleep replaces them.
    """

    model: PyroProgram
    guide: PyroProgram
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[Sequence[Any], Mapping[str, Any]] | None = None  # args and kwargs before the guide prepared them

    def prepared(self) -> Programs:
        """Let the guide prepare the arguments; prepared ones stay as they are."""
        if self.given is not None:
            return self
        given = (self.args, self.kwargs)
        prepare = _preparation(self.guide)
        if prepare is None:
            return replace(self, given=given)
        found = prepare(*self.args, **self.kwargs)
        args, kwargs = found if isinstance(found, Arguments) else (found, {})
        return replace(self, args=args, kwargs=kwargs, given=given)

    @property
    def as_given(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The `args` and `kwargs` of the caller, which a learned baseline or a critic sees."""
        return self.given or (self.args, self.kwargs)

    def loss(self, elbo: Any) -> Tensor:
        """Compute minus the objective, differentiable."""
        return elbo.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)

    def under(self, handler: Handler) -> Programs:
        """Put both programs under an effect handler."""
        return replace(self, model=handler(self.model), guide=handler(self.guide))

    def with_subsamples(self, subsamples: poutine.Trace) -> Programs:
        """Keep both programs to the datapoints drawn before: a plate shows all particles the same ones."""
        return self.under(functools.partial(poutine.replay, trace=subsamples))


def unwrapped(program: PyroProgram) -> tuple[PyroProgram, tuple[Messenger, ...]]:
    """Unwrap the program within effect handlers; returns also the handlers, outermost first."""
    handlers: list[Messenger] = []
    while isinstance(program, functools.partial):
        if program.keywords or (program.args and not isinstance(program.args[0], Messenger)):
            break  # a partial of the caller's own
        if program.args:
            handler, program = program.args
            handlers.append(handler)
        else:
            program = program.func
    return program, tuple(handlers)


def _preparation(guide: PyroProgram) -> Callable[..., Sequence[Any]] | None:
    """Find the guide's method `prepare`, also within effect handlers."""
    inner, handlers = unwrapped(guide)
    if any(hasattr(handler, "_pyro_param") for handler in handlers):
        return None  # `prepare` would run outside of the handlers, which change the parameters
    prepare = getattr(inner, "prepare", None)
    return prepare if inspect.ismethod(prepare) else None
