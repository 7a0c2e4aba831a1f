"""Training on from trained weights: the weights, not the optimizer, and what is known of how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vma_pyro import pretrained
from vma_pyro._system import checkpoint
from vma_pyro.models import Pair
from vma_pyro.models.files import take_weights


def start_from(path: str | Path, pair: Pair) -> list[dict[str, Any]]:
    """Give model and guide the weights in a file.

    Parts that the file's networks did not have are allowed where they start without an effect (`starts_silent`).

    Args:
        path: a trained model or the checkpoint of a run; the word "pretrained" stands for the published model.
        pair: model and guide.

    Returns:
        The cycles of training behind the weights, oldest first; facts of each (updates, seconds, command, ...).

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, without weights, or of other programs.
    """
    content = checkpoint.load(pretrained.file_of(path))
    take_weights(pair, content, file=str(path), and_more=True)
    return _cycles(content)


def _cycles(content: dict[str, Any]) -> list[dict[str, Any]]:
    """List the cycles of training behind a file's weights, oldest first."""
    if "progress" in content:  # a run's own checkpoint
        progress = content["progress"]
        last = {"updates": progress["update"], "training_seconds": round(progress["seconds"], 1)}
        return [*content.get("cycles", []), content["identity"] | last]
    facts = dict(content.get("training", {}))
    return [*facts.pop("cycles", []), *([facts] if facts else [])]
