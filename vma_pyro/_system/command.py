"""The command that started this process, to be shown and to be typed again."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def command() -> str:
    """Say how the script that runs was called, as one would call it from the root of the repository."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    shown = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    how = ["uv", "run"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, total = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        how = ["torchrun", f"--nnodes={total // local}", f"--nproc_per_node={local}"]
    return shlex.join([*how, shown.as_posix(), *(a for a in sys.argv[1:] if a != "--resume")])
