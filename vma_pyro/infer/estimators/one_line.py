"""Errors of Pyro and torch in one line."""

from __future__ import annotations

from typing import Any

from vma_pyro.infer.engine.running import is_about_shapes


class OneLine:
    """Errors of Pyro and torch in one line; those of a program with what it is expected to take."""

    def __init__(self, program: str = "", *, enumerated: bool = False) -> None:
        self.program, self.enumerated = program, enumerated

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, ValueError | RuntimeError | NotImplementedError | IndexError | TypeError):
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        is_single = text.startswith("vectorize_particles")  # of a program that looks at single values
        if isinstance(error, ValueError) and not (self.enumerated and is_single):
            if len(lines) == 1:
                return
            raise ValueError(text) from error
        if not self.program:
            raise ValueError(text) from error
        if not (is_single or isinstance(error, NotImplementedError) or is_about_shapes(lines[0])):
            return  # the program's own
        what = "all values of its discrete sites" if self.enumerated else "all particles"
        cause = error.__cause__ if is_single and error.__cause__ is not None else error
        raise ValueError(
            f"{self.program}: expected to take {what} at once, in a new dimension on the left, got "
            f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
