"""Running programs; their errors keep to one line, also under handlers that change the shapes of sites."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites

from vma_pyro.infer.engine.plates import PARTICLES, PyroProgram, drawn_by
from vma_pyro.infer.engine.programs import Programs

PROGRAM_ERRORS = (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError)
WATCHES: list[Messenger] = []  # of which the last stands inside all handlers of every run
LOOKS: list[None] = []  # under way; their runs are no part of an estimate
SINGLE_VALUE = ("converted to Scalar", "Boolean value of Tensor with more than one value is ambiguous")


def run(
    program: PyroProgram, args: Sequence[Any], kwargs: Mapping[str, Any], *, enumerated: Collection[str] = ()
) -> poutine.Trace:
    """Trace a program; its errors lose the shapes of all sites that Pyro adds to them.

    The values of `enumerated` sites stand in new dimensions on the left, which an error may be about.
    """
    watched: Any = WATCHES[-1](program) if WATCHES else program
    try:
        return poutine.trace(watched).get_trace(*args, **kwargs)
    except PROGRAM_ERRORS as error:
        cause = error.__cause__
        own = cause if type(cause) is type(error) and str(error).startswith(str(cause)) else error
        explained = _explained(str(own), enumerated)
        if explained is not None:
            raise ValueError(explained) from error
        if own is error:
            raise
        raise own from None


@contextmanager
def looking() -> Iterator[None]:
    """Say that runs are no part of an estimate."""
    LOOKS.append(None)
    try:
        yield
    finally:
        LOOKS.pop()


def run_both(programs: Programs) -> tuple[poutine.Trace, poutine.Trace]:
    """Trace the guide, and the model on what the guide has drawn, both without sites of subsampling."""
    guide_trace = run(programs.guide, programs.args, programs.kwargs)
    replayed = poutine.replay(programs.model, trace=drawn_by(guide_trace))
    model_trace = run(replayed, programs.args, programs.kwargs)
    return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)


def _explained(told: str, enumerated: Collection[str]) -> str | None:
    """Explain in one line what our handlers bring about; None for a program's own errors."""
    first = told.splitlines()[0] if told else ""
    if collision := re.match(r'at plates "(.*)" and "(.*)", collide at dim=-(\d+)', first):
        plates = [name for name in collision.groups()[:2] if name != PARTICLES]
        if len(plates) == 1:
            needed = int(collision[3])
            return (
                f"max_plate_nesting: expected at least {needed}, as plate '{plates[0]}' is at dimension "
                f"-{needed}, got {needed - 1}"
            )
    if any(sign in first for sign in SINGLE_VALUE):
        return (
            "vectorize_particles: expected False for a program that looks at single values, as all particles "
            f"at once have many, got True ({first})"
        )
    if enumerated and is_about_shapes(first):
        names = " and ".join(f"'{name}'" for name in sorted(enumerated))
        return (
            f"site {names}: its values stand in a new dimension on the left, shape [values, 1, ...] before the "
            f"plates, which programs must broadcast as under Pyro's parallel enumeration, but: {first}"
        )
    return None


def is_about_shapes(line: str) -> bool:
    """Tell whether an error is of the kind that one more dimension brings about."""
    own = re.match(r"(site '.*'|[\w.]+): (expected|its)", line)  # one of ours, or of the program's own checks
    words = ("shape", "size", "dimension", "broadcast", "expand", "index", "same number of dims")
    return not own and any(word in line.lower() for word in words)


@contextmanager
def one_line(program: str = "", *, enumerated: bool = False) -> Iterator[None]:
    """Shorten errors of Pyro and torch to one line, and add what a program is expected to take."""
    try:
        yield
    except PROGRAM_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        is_single = text.startswith("vectorize_particles")  # of a program that looks at single values
        if isinstance(error, ValueError) and not (enumerated and is_single):
            if len(lines) == 1:
                raise
            raise ValueError(text) from error
        if not program:
            raise ValueError(text) from error
        if not (is_single or isinstance(error, NotImplementedError) or is_about_shapes(lines[0])):
            raise  # the program's own
        what = "all values of its discrete sites" if enumerated else "all particles"
        cause = error.__cause__ if is_single and error.__cause__ is not None else error
        raise ValueError(
            f"{program}: expected to take {what} at once, in a new dimension on the left, got "
            f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
