"""Which classes a file may have made: those of this package, and those that a caller or a user names."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

from vma_pyro._system.parts import Part
from vma_pyro.models.programs import class_name

PACKAGE = "vma_pyro"


class Allowed:
    """Finds subclasses of `Part` by their names in files.

    Args:
        classes: those that are allowed beside the package's own.

    Raises:
        ValueError: no subclass of `Part`, or two of one name.
    """

    def __init__(self, classes: Iterable[type[Part]] = ()) -> None:
        self.others: dict[str, type[Part]] = {}
        for kind in classes:
            if not _is_part(kind):
                raise ValueError(f"classes: expected subclasses of vma_pyro.Part, got {kind!r}")
            if self.others.setdefault(class_name(kind), kind) is not kind:
                raise ValueError(f"classes: expected one class of the name {class_name(kind)}, got two")

    def find(self, name: str) -> type[Part]:
        """Find the class of a name "module:Qualified.Name".

        Raises:
            ValueError: not allowed, not to be had, or no subclass of `Part`.
        """
        if name in self.others:
            return self.others[name]
        module, _, path = name.partition(":")
        if module.split(".")[0] != PACKAGE:
            known = ", ".join(self.others)
            raise ValueError(
                f"expected classes of {PACKAGE}{' or ' + known if known else ''}, got {name[:80]!r}; if you trust "
                f"its code, allow it: classes=({path[:80]},), or --code of few_shot.py and the page"
            )
        try:
            found: Any = import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError, TypeError):
            raise ValueError(f"expected a class of {PACKAGE}, got {name[:80]!r}, which it does not have") from None
        # A class that has moved is still found where it was, if it is imported there.
        if not _is_part(found) or found.__module__.split(".")[0] != PACKAGE:
            raise ValueError(f"expected a subclass of {PACKAGE}.Part, got {name[:80]!r}")
        return found


def classes_in(source: str | Path | None) -> tuple[type[Part], ...]:
    """Find the parts in a user's Python file or module, to allow them in `load`; none for None.

    Args:
        source: a file `my_model.py`, which is run, or a module by its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be imported, or holds no subclass of `Part`.
    """
    if source is None:
        return ()
    module = _imported(str(source))
    found = tuple(
        dict.fromkeys(
            kind for kind in _parts(list(vars(module).values())) if kind.__module__.split(".")[0] != PACKAGE
        )
    )
    if not found:
        raise ValueError(f"code: expected subclasses of vma_pyro.Part in {source}, found none")
    return found


def _imported(source: str) -> ModuleType:
    """Import a module or file, under the name that others import it by and with its neighbours in reach."""
    path = Path(source)
    try:
        if path.suffix != ".py":
            return import_module(source)
        if not path.is_file():
            raise FileNotFoundError(f"code: expected a Python file, found none at {source}")
        present = sys.modules.get(path.stem)
        if present is not None:
            if Path(getattr(present, "__file__", None) or "").resolve() != path.resolve():
                raise ValueError(f"code: expected a file of another name, got {source}: there is such a module")
            return present
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        spec = util.spec_from_file_location(path.stem, path)
        assert spec is not None  # it is a .py file
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
        return module
    except (Exception, SystemExit) as error:
        if str(error).startswith("code: "):
            raise
        told = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"code: expected Python code that can be imported, got {source} ({type(error).__name__}: {told})"
        ) from error


def _parts(values: Iterable[Any]) -> Iterator[type[Part]]:
    """Find the parts among these values, and those that are defined within the classes among them."""
    for kind in values:
        if isinstance(kind, type):
            if _is_part(kind):
                yield kind
            inner = (v for v in vars(kind).values() if isinstance(v, type))
            yield from _parts(v for v in inner if v.__qualname__ == f"{kind.__qualname__}.{v.__name__}")


def _is_part(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Part)
