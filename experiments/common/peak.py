"""How much memory this process has needed at most."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_so_far() -> float:
    """GiB of resident memory that this process has needed at most."""
    # Linux hands the peak that `resource` tells down from the parent; this one is the process's own.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
