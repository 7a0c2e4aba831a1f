"""Parts of a program: modules that remember how they were made, so that a file can say how to make them again."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MOST_LEVELS = 20  # of containers in containers among arguments


class Part(nn.Module):
    """A module that remembers the arguments of its constructor, defaults included.

    A subclass need do nothing for it: its `__init__` is wrapped, and the outermost one counts.

    Attributes:
        made_with: the arguments by name, as they stand in the signature of the class; tensors and containers as
            they were then, whatever becomes of them in training.
        made_of: what its constructor made of them, see `composition`.
    """

    made_with: dict[str, Any]
    made_of: dict[str, str]

    def completed(self) -> None:
        """Note what it is made of now: what its constructor left open will be made in the same way again."""
        self.__dict__["made_of"] = composition(self)

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the constructor of a subclass note what it is given, even where the subclass only inherits it."""
        super().__init_subclass__(**options)
        if not hasattr(cls.__init__, "notes_arguments"):
            cls.__init__ = _noting(cls.__init__)  # type: ignore[method-assign]


def composition(part: nn.Module) -> dict[str, str]:
    """Name the class of every module within a module, with its arguments and the attributes of their names.

    Parts among its arguments answer for themselves: they may be completed by others since.
    """
    found = {}
    given = {id(value) for value in vars(part).get("made_with", {}).values() if isinstance(value, Part)}
    own = {name for name, module in part.named_modules() if id(module) in given}
    for name, module in part.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in own):
            continue
        if name in own:
            found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
            continue
        made_with = vars(module).get("made_with", {})
        held = {key: vars(module)[key] for key in made_with if key in vars(module)}
        plain = [
            f"{key}={value!r}"
            for values in (made_with, held)
            for key, value in values.items()
            if value is None or isinstance(value, bool | int | float | str)
        ]
        found[name] = f"{type(module).__module__}.{type(module).__qualname__}({', '.join(plain)})"
    return found


def check_unchanged(part: Part, name: str) -> None:
    """Refuse to say what a part was made with where it has become another since: that would be made again."""
    now, then = composition(part), vars(part).get("made_of", {})
    for within in sorted(now.keys() | then.keys()):
        if now.get(within) != then.get(within):
            raise ValueError(
                f"{within or 'an attribute'} of {name} has changed: {now.get(within)}, made as {then.get(within)}"
            )
    for key, value in vars(part).get("made_with", {}).items():
        if isinstance(value, nn.Module) and part._modules.get(key, value) is not value:
            raise ValueError(f"{key} of {name} is another one than it was made with")


def module_of(thing: Any) -> str:
    """The name of the module of a class or function; a script that runs goes by its file."""
    module: str = thing.__module__
    if module == "__main__" and getattr(sys.modules[module], "__file__", None):
        return Path(str(sys.modules[module].__file__)).stem
    return module


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that notes its arguments before it runs."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Part, *args: Any, **kwargs: Any) -> None:
        # Constructors of base classes run inside that of the class, which has noted its arguments already.
        outermost = "made_with" not in self.__dict__
        if outermost:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                init(self, *args, **kwargs)  # says in Python's own words what is wrong
                raise
            bound.apply_defaults()
            _, *rest = bound.arguments.items()  # without self
            # Past `__setattr__`, which takes modules for submodules and wants `nn.Module.__init__` first.
            self.__dict__["made_with"] = {name: _as_it_is(value) for name, value in rest}
        init(self, *args, **kwargs)
        if outermost:
            self.__dict__["made_of"] = composition(self)

    __init__.notes_arguments = True  # type: ignore[attr-defined]
    return __init__


def _as_it_is(value: Any, levels: int = MOST_LEVELS) -> Any:
    """A copy of what may change later: of containers, and of tensors, which may become parameters."""
    if levels == 0:  # a list may hold itself
        return value
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_as_it_is(item, levels - 1) for item in value)
    if type(value) is dict:
        return {key: _as_it_is(item, levels - 1) for key, item in value.items()}
    return value
