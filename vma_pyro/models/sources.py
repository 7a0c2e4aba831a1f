"""What the classes of a program say: a digest of the source of each, so that a change is seen and named."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

from vma_pyro._system.parts import module_of

Sources = dict[str, str]  # qualified name of a class to a digest of its source; "" where that is not to be had

OTHERS = {"torch", "pyro", "lightning_fabric", "lightning", "numpy"} | set(sys.stdlib_module_names)


def digest_sources(*modules: nn.Module) -> Sources:
    """Digest the source of every class of the modules, but for those of torch and Pyro."""
    classes = {kind for module in modules for part in module.modules() for kind in type(part).__mro__}
    ours = [kind for kind in classes if is_ours(kind)]
    return {name_of(kind): digest_source(kind) for kind in sorted(ours, key=name_of)}


def check_sources(saved: Sources, present: Sources) -> None:
    """Refuse to go on with classes that are not those of the checkpoint, naming the first.

    Raises:
        ValueError: a class that is new, gone or changed.
    """
    changed = changes(saved, present)
    if changed:
        raise ValueError(
            f"resume: expected {changed[0]} as in the checkpoint, got another one; undo the change, or begin a "
            "new run in another folder"
        )


def changes(saved: Sources, present: Sources) -> list[str]:
    """List the classes that are not the same in both; by name alone where there is no source."""
    return [
        name
        for name in sorted(saved.keys() | present.keys())
        if name not in saved
        or name not in present
        or (saved[name] != present[name] and saved[name] and present[name])
    ]


def is_ours(thing: Any) -> bool:
    """Whether a class or function belongs to the program, not to what it is written with."""
    return (getattr(thing, "__module__", None) or "builtins").split(".")[0] not in OTHERS


def name_of(thing: Any) -> str:
    """The qualified name of a class or function, in which a script that runs goes by its file."""
    return f"{module_of(thing)}.{thing.__qualname__}"


@cache  # as it was at first: the file may be edited while its program runs
def digest_source(thing: Any) -> str:
    """Digest the source of a class or function and what it uses of its module, without comments; "" if unknown."""
    try:
        return hashlib.sha256("\n".join(sorted(set(_texts(thing, set())))).encode()).hexdigest()[:16]
    except (OSError, TypeError, SyntaxError, KeyError):  # typed in, or built at run time
        return ""


def _texts(thing: Any, seen: set[str]) -> Iterator[str]:
    """Collect the source of a class or function, and of what it names of its program."""
    module = sys.modules[thing.__module__]
    yield name_of(thing)
    todo = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    defined = _definitions(module)
    while todo:
        node = todo.pop()
        yield _text(node)
        for name, value in _named(node, module):
            if name in seen:
                continue
            seen.add(name)
            if name in defined:
                todo.append(defined[name])
            elif (inspect.isfunction(value) or inspect.isclass(value)) and _is_users(value):
                yield from _texts(value, seen)


def _is_users(value: Any) -> bool:
    # What this package's modules take from each other is judged by what comes of it: the probe. Of what is
    # installed the version counts, not the source.
    file = getattr(sys.modules.get(value.__module__), "__file__", None) or "site-packages"
    return is_ours(value) and not value.__module__.startswith("vma_pyro.") and "site-packages" not in file


def _definitions(module: ModuleType) -> dict[str, ast.stmt]:
    """Find functions, classes and values by name, as they stand in the module's source."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return found


def _named(node: ast.AST, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Find what a piece of source names: of the module itself, or of another one by its module."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id, vars(module).get(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            other = vars(module).get(part.value.id)
            if isinstance(other, ModuleType):
                yield f"{part.value.id}.{part.attr}", getattr(other, part.attr, None)


def _text(node: ast.AST) -> str:
    """Strip a piece of source of comments, docstrings and layout."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            first = part.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                part.body = part.body[1:] or [ast.Pass()]
    return ast.unparse(node)
