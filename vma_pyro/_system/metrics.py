"""Figures of a run: metrics.jsonl, a progress line, and TensorBoard if wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vma_pyro._system.atomic import write_text


class Recorder:
    """Appends one JSON object per line to `metrics.jsonl`; each line carries its update.

    Args:
        folder: of the run; must exist. None: nothing is written (by a process beside the first).
        resume_at: keep the lines up to this update and drop later ones, which the resumed run writes again; 0
            starts a new file.
        tensorboard: also write TensorBoard events (needs the extra `track`).
        total: updates planned, for the progress line; None if only time is limited.
        label: in front of the progress line.
        show: whether to draw the progress line.

    Raises:
        ValueError: TensorBoard wanted but not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        resume_at: int = 0,
        tensorboard: bool = False,
        total: int | None = None,
        label: str = "",
        show: bool = True,
    ) -> None:
        self._file: Any = None if folder is None else _reopened(folder / "metrics.jsonl", resume_at)
        self._writer: Any = None
        if folder is not None and tensorboard:
            self._writer = tensorboard_writer()(str(folder / "tensorboard"), purge_step=resume_at + 1)
        self._status: dict[str, str] = {}
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=resume_at,
            unit="update",
            disable=not show,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def advance(self) -> None:
        """Count one more update."""
        self._bar.update()

    def write(self, update: int, **figures: float) -> None:
        """Record figures at an update and show the main ones."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"update": update, **figures}) + "\n")
        except OSError as error:  # a full disk must not end the run
            self.note(f"warning: figures of update {update} not written ({error})")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, update)
        shown = {"bound": "bound", "kl_address": "KL(a)", "kl_z": "KL(z)", "validation_nll": "validation NLL"}
        self._status |= {shown[name]: f"{value:.2f}" for name, value in figures.items() if name in shown}
        self._bar.set_postfix(self._status, refresh=False)

    def note(self, message: str) -> None:
        """Print a line above the progress line."""
        self._bar.write(message)

    def close(self) -> None:
        """Close files and the progress line."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _reopened(path: Path, resume_at: int) -> Any:
    """Open the file of figures to add to it, with those up to an update."""
    kept = _lines_until(path, resume_at) if resume_at else []
    if not path.exists() or path.read_text() != "".join(kept):
        write_text(path, "".join(kept))  # as a whole: a crash while dropping lines must not lose the others
    return path.open("a", buffering=1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the figures of a run, oldest first; an unfinished last line (a killed run) is left out."""
    return [json.loads(line) for line in _lines_until(path, None)]


def _lines_until(path: Path, update: int | None) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and (update is None or figures["update"] <= update):
            kept.append(line)
    return kept


def tensorboard_writer() -> Any:
    """Import TensorBoard's writer class.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard: expected it installed, found none; pip install 'vma-pyro[track]'"
        ) from error
    return SummaryWriter
