"""Files of trained models: weights, what makes their programs again, and how they were trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vma_pyro import pretrained
from vma_pyro._system import checkpoint
from vma_pyro._system.copied import copied
from vma_pyro._system.parts import Part
from vma_pyro.models.allowed import Allowed
from vma_pyro.models.description import architecture_of, describe, rebuild
from vma_pyro.models.growth import grown
from vma_pyro.models.packing import packed, round_to, unpacked
from vma_pyro.models.programs import Pair, build, program_of
from vma_pyro.models.provenance import check_weights, record_provenance

PRETRAINED, CAUSAL = pretrained.WORD, pretrained.CAUSAL


def save(path: str | Path, pair: Pair, *, bits: int | None = None, **facts: Any) -> None:
    """Write weights with what is needed to make their programs again, and facts (plain values) to go with them.

    Programs with arguments that no file can say (a function, a plain torch module) are saved as well, but only
    `read_weights` takes them back.

    Args:
        path: of the file.
        pair: model and guide.
        bits: of each weight in the file, 16 or 8, which have to hold it exactly, see `rounded`; all by default.
        facts: what else the file is to say.

    Raises:
        OSError: the folder cannot be written or the disk is full.
        ValueError: weights that so many bits do not hold exactly.
    """
    weights: dict[str, Any] = as_one(pair).state_dict()
    if bits is not None:
        weights = packed(weights, bits)
    content = facts | describe(*pair) | {"program": record_provenance(*pair), "weights": weights}
    checkpoint.save(path, content)


@torch.no_grad()
def rounded(pair: Pair, bits: int) -> Pair:
    """A copy of model and guide with the nearest weights that 16 or 8 bits hold, in their own type.

    With 8 bits those of a row of a matrix (or of maps of a convolution) have a scale in common.
    """
    copies: Any = copied(as_one(pair))
    for tensor in copies.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(round_to(tensor, bits))
    return copies["model"], copies["guide"]


def load(
    path: str | Path, *, program: str | tuple[str, ...] | None = None, classes: Iterable[type[Part]] = ()
) -> Pair:
    """Make model and guide again from a file of `save`, or from a run's checkpoint.

    Args:
        path: of the file.
        program: refuse any other than this one, or these (see `program_of`); None takes all of them.
        classes: classes of your own that the file may name, as a file can be a stranger's: by default only those
            of this package are made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or another program; classes that are not allowed, or that do not
            take the arguments in the file.
    """
    allowed = tuple(classes)
    Allowed(allowed)  # what is wrong with them is not the file's fault
    content = checkpoint.load(pretrained.file_of(path))
    try:
        pair = _made(content, allowed)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    wanted = (program,) if isinstance(program, str) else program
    found = program_of(pair)
    if wanted is not None and found not in wanted:
        raise ValueError(f"checkpoint {path}: expected a {' or '.join(wanted)} model, got one of {found}")
    take_weights(pair, content, file=str(path))
    return pair


def _made(content: Mapping[str, Any], classes: tuple[type[Part], ...]) -> Pair:
    """Make model and guide, with fresh weights, as their file says."""
    if content.get("architecture"):  # files of before there were parts
        if not isinstance(content["architecture"], dict):
            raise ValueError("architecture: expected names and their values, got malformed ones")
        return build(content["architecture"])
    if "parts" not in content:
        raise ValueError(f"expected a trained model, got one of {', '.join(content)}")
    return rebuild(content, classes=classes)


def read_weights(pair: Pair, path: str | Path) -> None:
    """Take over the weights of the same programs.

    Args:
        pair: model and guide, built as those in the file.
        path: of a file of `save`, or of a run's checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or one of other programs: by their shapes, or by what they give
            on an example.
    """
    take_weights(pair, checkpoint.load(pretrained.file_of(path)), file=str(path))


def take_weights(pair: Pair, content: Mapping[str, Any], *, file: str, and_more: bool = False) -> None:
    """Take over the weights of a file that is read already.

    Args:
        pair: model and guide.
        content: of the file.
        file: its name, for errors.
        and_more: whether the pair may have parts that are not in the file, where they start without an effect
            (`starts_silent`), and be wider.

    Raises:
        ValueError: see `read_weights`.
    """
    if not isinstance(content.get("weights"), dict):
        raise ValueError(f"checkpoint {file}: expected a trained model, got one with {', '.join(content)}")
    programs: Any = as_one(pair)
    # What an estimator learned for itself (a baseline) is not needed any more.
    weights = {k: v for k, v in content["weights"].items() if str(k).startswith(("model.", "guide."))}
    try:
        weights = unpacked(weights)
    except ValueError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
    if and_more:
        # By all names: model and guide share theirs.
        parts = programs.named_modules(remove_duplicate=False)
        silent = [f"{name}." for name, part in parts if hasattr(part, "starts_silent")]
        # Only parts that are new as a whole: what else is missing has an effect.
        new = tuple(prefix for prefix in silent if not any(k.startswith(prefix) for k in weights))
        weights = {k: v for k, v in programs.state_dict().items() if k.startswith(new)} | weights
        wide = grown(programs, weights)
        is_wider = any(wide[name] is not weights[name] for name in wide)
        if is_wider and (content.get("program") or {}).get("probe") is not None:
            try:
                _take(programs, wide, content.get("program"), file=file)
            except ValueError:  # said below of the shapes, as it is they that differ
                pass
            else:
                return
    _take(programs, weights, content.get("program"), file=file)


def _take(programs: Any, weights: dict[str, Any], saved: Any, *, file: str) -> None:
    """Take over weights that give with these programs what they gave with their own; else change nothing."""
    before = {name: value.clone() for name, value in programs.state_dict().items()}
    checkpoint.restore(programs, weights, name=f"model and guide for {file}")
    try:
        check_weights(saved, programs.model, programs.guide, file=file)
    except ValueError:
        programs.load_state_dict(before)
        raise


def facts_of(path: str | Path) -> dict[str, Any]:
    """Read what a file says of itself: its programs, and how and on which data they were trained."""
    content = checkpoint.load(pretrained.file_of(path))
    known = architecture_of(content) | dict(content.get("training", {}))
    if "progress" in content:  # of a run, perhaps an unfinished one
        progress = content["progress"]
        known |= content["identity"] | {
            "updates": progress["update"],
            "training_seconds": round(progress["seconds"], 1),
            "validation_nll": progress["best_nll"],
            "finished": progress["finished"],
        }
        known |= {"cycles": content["cycles"]} if content.get("cycles") else {}
    known |= content.get("architecture", {})
    return known | ({"data": content["data"]} if "data" in content else {})


def updates_of(facts: Mapping[str, Any]) -> str:
    """Count the updates behind trained weights, cycle by cycle: "60,000 + 21,000"."""
    return " + ".join(f"{cycle['updates']:,}" for cycle in (*facts.get("cycles", ()), facts))


def on(device: torch.device, pair: Pair) -> Pair:
    """Move both to a device."""
    model, guide = pair
    return model.to(device), guide.to(device)


def as_one(pair: Pair) -> nn.Module:
    """Join both in one module, with the parameters they share."""
    model, guide = pair
    return nn.ModuleDict({"model": model, "guide": guide})
