"""What makes a model and its guide: classes and their arguments, said in a file and made again from it.

A file may be a stranger's. Of what it names only subclasses of `Part` are ever called, and of these only the ones
of this package and those that the caller allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vma_pyro._system.parts import MOST_LEVELS, Part, check_unchanged
from vma_pyro.models.allowed import Allowed
from vma_pyro.models.programs import CONTEXT, NETWORKS, Pair, class_name, name_of_likelihood, name_program

PLAIN = (type(None), bool, int, float, str)
NETWORK_NAMES = {class_name(kind): name for name, kind in NETWORKS.items()}


def describe(model: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """Say in plain values and tensors what makes this model and this guide.

    Returns:
        `parts`, in an order to make them in, each with its `class` ("module:Qualified.Name") and its `arguments`
        by name, which may be earlier parts by their number; and `pair`, the numbers of model and guide. Where
        that cannot be said, `parts` is a line that says why.
    """
    parts = _Parts()
    try:
        return {"pair": [parts.number(model, "the model"), parts.number(guide, "the guide")], "parts": parts.said}
    except ValueError as error:
        return {"parts": str(error)}


class _Parts:
    """Holds the parts that are described so far, each once.

    Attributes:
        said: of each what a file says.
    """

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}

    def number(self, part: Any, what: str) -> int:
        """Describe a part, after the parts among its arguments, and give its number."""
        if not isinstance(part, Part):
            raise ValueError(f"{what} is a {class_name(type(part))}, which is no subclass of vma_pyro.Part")
        if id(part) not in self._numbers:
            name = class_name(type(part))
            made_with = vars(part).get("made_with", {})
            check_unchanged(part, name)
            given = {key: self.plain(value, f"the argument {key} of {name}") for key, value in made_with.items()}
            self.said.append({"class": name, "arguments": given})
            self._numbers[id(part)] = len(self.said) - 1
        return self._numbers[id(part)]

    def plain(self, value: Any, what: str, levels: int = MOST_LEVELS) -> Any:
        """Write an argument: a dictionary with one item stands for a part or for a dictionary."""
        if levels == 0:
            raise ValueError(f"{what} is nested more than {MOST_LEVELS} deep")
        # Of these types and not derived from them: files that name other classes are not read.
        if type(value) in PLAIN:
            return value
        if type(value) is Tensor:
            return value.detach().cpu().clone()
        if type(value) is list:
            return [self.plain(item, what, levels - 1) for item in value]
        if type(value) in (tuple, torch.Size):
            return tuple(self.plain(item, what, levels - 1) for item in value)
        if type(value) is dict:
            return {"dict": [[_key(key, what), self.plain(item, what, levels - 1)] for key, item in value.items()]}
        if isinstance(value, nn.Module):
            return {"part": self.number(value, what)}
        raise ValueError(f"{what} is a {class_name(type(value))}, which is no plain value, tensor or part")


def _key(key: Any, what: str) -> Any:
    if type(key) not in PLAIN:
        raise ValueError(f"{what} has a key that is a {class_name(type(key))}, which is no plain value")
    return key


def rebuild(description: Mapping[str, Any], *, classes: Iterable[type[Part]] = ()) -> Pair:
    """Make a model and its guide as `describe` has said.

    Args:
        description: what it returned, perhaps from a stranger's file.
        classes: those that may be made beside the package's own.

    Raises:
        ValueError: classes that are not allowed or not to be had, arguments that they do not take, or anything
            else that `describe` does not say.
    """
    parts, pair = description.get("parts"), description.get("pair")
    if isinstance(parts, str):
        raise ValueError(f"expected programs that can be made again, got ones of which {_one_line(parts)}")
    if not isinstance(parts, list) or not isinstance(pair, list | tuple) or len(pair) != 2:
        raise _malformed("parts and a pair", description)
    allowed = Allowed(classes)
    made: list[Part] = []
    for said in parts:
        if not isinstance(said, dict) or said.keys() != {"class", "arguments"}:
            raise _malformed("a class and its arguments", said)
        name, arguments = said["class"], said["arguments"]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _malformed("a class and its arguments", said)
        kind = allowed.find(name)
        given = {key: _value(value, made) for key, value in arguments.items()}
        made.append(_make(kind, name, given))
    model, guide = (_earlier(number, made) for number in pair)
    return model, guide


def architecture_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Name the program of a description, its networks and their plain arguments; nothing where it is malformed."""
    try:
        parts = description["parts"]
        model, guide = (parts[number] for number in description["pair"])
        networks = parts[model["arguments"]["networks"]["part"]]
        kind, program = networks["class"], model["class"]
        sizes = {name: value for name, value in networks["arguments"].items() if type(value) in PLAIN}
        guided = guide["arguments"].get("target_guided") is True
        chosen = model["arguments"].get("likelihood")
        likelihood, context = "bernoulli", {}
        if chosen is not None:
            likelihood, given = (
                name_of_likelihood(parts[chosen["part"]]["class"]),
                parts[chosen["part"]]["arguments"],
            )
            context = {f"context_{name}": given[name] for name in CONTEXT if name in given}
        return {
            "networks": NETWORK_NAMES.get(kind, kind),
            **sizes,
            "likelihood": likelihood,
            **context,
            "program": name_program(program, guided=guided),
        }
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        return {}


def check_arguments(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on with parts that are made otherwise than those of the checkpoint.

    Only where both are of the same classes: others are refused by their sources, shapes and figures.

    Raises:
        ValueError: the first argument that differs.
    """
    before, now = saved.get("parts"), present.get("parts")
    if not isinstance(before, list) or not isinstance(now, list):
        return
    if [part["class"] for part in before] != [part["class"] for part in now]:
        return
    for old, new in zip(before, now, strict=True):
        # One that only one of them has came with another version, whose default is what there was before.
        for name in sorted(old["arguments"].keys() & new["arguments"].keys()):
            first, second = (part["arguments"].get(name) for part in (old, new))
            if not _same(first, second):
                raise ValueError(
                    f"resume: expected {name} = {_shown(first)} of {old['class']} as in the checkpoint, "
                    f"got {_shown(second)}"
                )


def _value(written: Any, made: list[Part], levels: int = MOST_LEVELS) -> Any:
    """Read an argument as `plain` writes it."""
    if levels == 0:
        raise ValueError(f"parts: expected arguments that are nested at most {MOST_LEVELS} deep, got deeper ones")
    if type(written) in PLAIN or type(written) is Tensor:
        return written
    if type(written) in (list, tuple):
        return type(written)(_value(item, made, levels - 1) for item in written)
    if type(written) is dict and written.keys() == {"part"}:
        return _earlier(written["part"], made)
    if type(written) is dict and written.keys() == {"dict"} and _are_pairs(written["dict"]):
        return {key: _value(item, made, levels - 1) for key, item in written["dict"]}
    raise _malformed("plain values, tensors and parts", written)


def _earlier(number: Any, made: list[Part]) -> Part:
    """Find a part that is made already: there are no cycles."""
    if type(number) is not int or not 0 <= number < len(made):
        raise ValueError(
            f"parts: expected the number of one of the {len(made)} parts before, got {_shown(number)}"
        )
    return made[number]


def _make(kind: type[Part], name: str, given: dict[str, Any]) -> Part:
    """Make an object of the class with these arguments by name."""
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # without self
    unknown = given.keys() - {p.name for p in parameters}
    for parameter in parameters:
        value = given.get(parameter.name, ())
        if parameter.kind is parameter.VAR_POSITIONAL and type(value) is not tuple:
            raise _malformed(f"several values for {parameter.name} of {name}", value)
        if parameter.kind is parameter.VAR_KEYWORD and not _are_options(given.get(parameter.name, {})):
            raise _malformed(f"options for {parameter.name} of {name}", value)
    if unknown:
        names = ", ".join(p.name for p in parameters) or "none"
        got = _one_line(", ".join(sorted(map(str, unknown))))
        raise ValueError(f"expected arguments that {name} takes ({names}), got {got}")
    ordered = {p.name: given[p.name] for p in parameters if p.name in given}
    bound = inspect.BoundArguments(inspect.Signature(parameters), ordered)
    try:
        return kind(*bound.args, **bound.kwargs)
    except Exception as error:  # as many kinds as there are constructors
        told = _one_line(str(error) or type(error).__name__)
        raise ValueError(f"expected arguments that {name} takes, got others ({told})") from error


def _are_pairs(value: Any) -> bool:
    return type(value) is list and all(
        type(item) is list and len(item) == 2 and type(item[0]) in PLAIN for item in value
    )


def _are_options(value: Any) -> bool:
    return type(value) is dict and all(type(key) is str for key in value)


def _same(first: Any, second: Any) -> bool:
    """Whether two written arguments are equal, tensors value by value."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return repr(first) == repr(second)  # NaN is NaN


def _malformed(expected: str, got: Any) -> ValueError:
    return ValueError(f"parts: expected {expected}, got {_shown(got)}")


def _shown(value: Any) -> str:
    """Show a value in a few words."""
    return _one_line(f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value), most=60)


def _one_line(text: str, *, most: int = 200) -> str:
    """Put a text that may be a stranger's on one line that is not too long."""
    line = " ".join(text[: 2 * most].split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
