"""Runs one command and prints what it took, as JSON: a process that is small itself.

Linux counts what a parent has taken as what its child has: a parent that has imported Torch would be the peak of
every small command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time


def main() -> None:
    """Run it; print seconds, processor seconds of it and what it starts, GiB of the largest process, last line."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(sys.argv[1:], stdout=told, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        told.seek(0)
        last = (told.read().strip().splitlines() or [""])[-1]
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "code": os.waitstatus_to_exitcode(status),
        "last_line": last,
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss * unit / 2**30,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
