"""`--help` without waiting for Torch: the first import of every script.

A script's options stand in the same modules as what they are for, and importing that takes seconds, nearly all of
them for Torch and Pyro. Asked for help, a process computes nothing: it ends when the text is printed. So where a
script is started with `--help`, modules that have every name, each an empty class, stand in for the heavy
libraries. (That all scripts say the same with and without them is tested.) A process that has imported Torch has
waited for it already, and keeps it.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = (
    "torch",
    "torchvision",
    "pyro",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "matplotlib",
    "jaxtyping",
)


class Anything(ABCMeta):
    """Classes that stand for what nobody will use: they can be called, subscripted, derived from and decorate."""

    def __getattr__(cls, name: str) -> Any:
        """Stand for an attribute, the same one each time, as it may be a base of a class twice."""
        if name.startswith("__"):
            raise AttributeError(name)
        made = Anything(name, (), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Leave what is decorated as it is."""
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else cls

    def __getitem__(cls, item: Any) -> Any:
        """Stand for a generic class with arguments."""
        return cls

    def __setitem__(cls, item: Any, value: Any) -> None:
        """Take an entry of a registry, which nobody will look up."""

    def __or__(cls, other: Any) -> Any:
        """Stand for a union of types."""
        return cls

    __ror__ = __or__


class StandIn(ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        """Stand for anything in the module."""
        if name.startswith("__"):
            raise AttributeError(name)
        made = Anything(name, (), {})
        setattr(self, name, made)
        return made


class Finder(MetaPathFinder, Loader):
    """Finds stand-ins for the heavy libraries and all of their parts."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a stand-in, or leave the module to others."""
        heavy = fullname.partition(".")[0] in HEAVY
        return ModuleSpec(fullname, self, is_package=True) if heavy else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""


def is_asked_for() -> bool:
    """Whether this process was started for help, and has not imported Torch."""
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:]) and "torch" not in sys.modules


if is_asked_for():
    sys.meta_path.insert(0, Finder())
