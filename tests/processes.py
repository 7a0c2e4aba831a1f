"""Scripts in processes of their own, forked from one that has imported Torch and Pyro: seconds less for each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# Only imported: a process that has used several threads cannot be forked, so no test runs in this one.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pyro", "lightning.fabric", "matplotlib.figure", "tyro", "vma_pyro.laboratory"])
LIMIT = 300  # seconds


def run(path, *arguments, cwd, environment=None):
    """The finished process of `python PATH ARGUMENTS`, with one thread: a `subprocess.CompletedProcess`."""
    arguments = [str(path), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_script, args=(arguments, str(cwd), environment, files))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, LIMIT)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


def _script(arguments, cwd, environment, files):
    """What Python does with a script; runs in the new process."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
