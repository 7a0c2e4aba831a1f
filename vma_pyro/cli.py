"""The command line of every script: arguments in, one-line errors and exit codes out."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyro
import tyro

from vma_pyro._system import lock
from vma_pyro._system.allocator import keep_freed_memory
from vma_pyro._system.command import command

Config = TypeVar("Config")


class Stopped(Exception):
    """Says that a run was told to stop, and has left a checkpoint.

    Attributes:
        signal: that told it.
    """

    def __init__(self, signal: int, updates: int | None = None) -> None:
        at = "" if updates is None else f" at update {updates}"
        super().__init__(f"stopped{at}; go on with: {command()} --resume")
        self.signal = signal


def set_up() -> None:
    """Set Pyro up as all experiments use it: parameters live in the modules, and no value is checked."""
    keep_freed_memory()  # chunks of an evaluation free as much as updates do
    pyro.settings.set(module_local_params=True)
    pyro.enable_validation(False)  # 0.4 to 1.3 ms per update; the tests run with it


def run(
    main: Callable[[Config], object],
    config: type[Config],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run with command-line arguments; bad input ends in one line, not in a traceback.

    Args:
        main: what to run.
        config: the dataclass of its options.
        description: for `--help`.
        arguments: instead of those of the process.
    """
    set_up()
    given: Config | None = None
    try:
        given = _at_home(_parsed(config, description, arguments))
        main(given)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {_with_option(str(error), given or config)}")
    except Stopped as stop:
        print(stop)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:  # outside training: nothing to save
        sys.exit(128 + signal.SIGINT)
    finally:
        lock.release()


def _parsed(config: type[Config], description: str | None, arguments: Sequence[str] | None) -> Config:
    """Parse the options; what they themselves refuse is one line as well, not tyro's frame around it."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(config, description=description, args=arguments)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, ValueError) and re.match(r"\w+: expected ", str(cause)):
                if str(cause).partition(":")[0] in {f.name for f in fields(config)}:  # type: ignore[arg-type]
                    raise ValueError(str(cause)) from end  # refused by the options as a whole
                print(f"error: {_with_option(str(cause), config)}", file=sys.stderr)
                break
            cause = cause.__cause__ or cause.__context__
        else:
            sys.stderr.write(told.getvalue())
        raise


def _at_home(config: Config) -> Config:
    """Put the home folder in place of ~, which a shell leaves alone after an equals sign."""
    paths = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
    found = {}
    for name, path in paths.items():
        if isinstance(path, Path) and str(path).startswith("~"):
            try:
                found[name] = path.expanduser()
            except RuntimeError as error:
                raise ValueError(f"{name}: expected a home folder for ~, found none, got {path}") from error
    return replace(config, **found)  # type: ignore[type-var]


def _with_option(message: str, config: Any) -> str:
    """Name the option in a message about its value as it is typed."""
    name, colon, rest = message.partition(":")
    if name == "checkpoint":  # which is not what a user has typed
        name = _option_with_file(rest, config) or name
    return f"--{name.replace('_', '-')}{colon}{rest}" if name in _options(config) else message


def _option_with_file(message: str, config: Any) -> str:
    """Find the option that names the file in a message, or the folder that it is in; "" where none does."""
    words = [Path(word.strip(",:")) for word in message.split()]
    values = {f.name: getattr(config, f.name, None) for f in fields(config)} if is_dataclass(config) else {}
    paths = {name: value for name, value in values.items() if isinstance(value, Path) and value.parts}
    found = [name for name, path in paths.items() if any(word.is_relative_to(path) for word in words)]
    return max(found, key=lambda name: len(paths[name].parts), default="")


def _options(config: Any) -> set[str]:
    """List the names of all options, those of parts among them."""
    names = set()
    for option in fields(config) if is_dataclass(config) else ():
        names.add(option.name)
        part = getattr(config, option.name, None)
        if option.default_factory is not MISSING:
            part = option.default_factory()
        names |= _options(part)
    return names


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Refuse numbers of things, or several of them, below the least."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not number >= least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")


def check_seed(config: Any) -> None:
    """Refuse a seed that no generator takes."""
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2^63 - 1, got {config.seed}")


def check_factor(config: Any, name: str) -> None:
    """Refuse a factor that is none."""
    value = getattr(config, name)
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number more than 0, got {value}")


@contextlib.contextmanager
def option(name: str, *, instead_of: str) -> Iterator[None]:
    """Have errors about an argument of something inside name the option that it came from."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if not str(error).startswith(f"{instead_of}: "):
            raise
        raise type(error)(name + str(error).removeprefix(instead_of)) from error
