"""Training on from published weights: the weights, not the optimizer, and what is known of how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vma_pyro import pretrained
from vma_pyro._system import checkpoint
from vma_pyro.training.provenance import check_weights


def start_from(path: str | Path, programs: Any) -> list[dict[str, Any]]:
    """Give model and guide the weights in a file.

    Parts that the file's networks did not have are allowed where they start without an effect (`starts_silent`).

    Args:
        path: a trained model or the checkpoint of a run; the word "pretrained" stands for the published model.
        programs: model and guide as one module, `elbo(model, guide)`.

    Returns:
        The cycles of training behind the weights, oldest first; facts of each (updates, seconds, command, ...).

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, without weights, or of other programs.
    """
    path = Path(path)
    content = checkpoint.load(pretrained.file_of(path))
    if "weights" not in content:
        raise ValueError(f"init: expected a trained model, got {path} with {', '.join(content)}")
    weights = {k: v for k, v in content["weights"].items() if k.startswith(("model.", "guide."))}
    # What an estimator learns for itself (a baseline) begins anew, and so does what starts without an effect.
    parts = programs.named_modules(remove_duplicate=False)  # model and guide share theirs
    silent = tuple(f"{name}." for name, part in parts if hasattr(part, "starts_silent"))
    own = programs.state_dict()
    new = {k: v for k, v in own.items() if k.startswith(silent) or not k.startswith(("model.", "guide."))}
    checkpoint.restore(programs, {**new, **weights}, name="this run")
    check_weights(content.get("program"), programs.model, programs.guide, file=str(path))
    return cycles_of(content)


def cycles_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The cycles of training behind a file's weights, oldest first."""
    if "progress" in content:  # a run's own checkpoint
        progress = content["progress"]
        last = {"updates": progress["update"], "training_seconds": round(progress["seconds"], 1)}
        return [*content.get("cycles", []), content["identity"] | last]
    facts = dict(content.get("training", {}))
    return [*facts.pop("cycles", []), *([facts] if facts else [])]
