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
# What cannot be imported is left out without a word, so tests/test_structure.py looks whether all of it is there.
PRELOADED = [
    *("pyro", "lightning_fabric", "matplotlib.figure", "tyro"),
    *(f"vma_pyro.{room}" for room in ("cli", "comparisons", "data", "evaluation", "infer", "models", "training")),
]
SERVER.set_forkserver_preload(PRELOADED)
LIMIT = 300  # seconds


def run(path, *arguments, cwd, environment=None):
    """The finished process of `python PATH ARGUMENTS`, with one thread: a `subprocess.CompletedProcess`."""
    return start(path, *arguments, cwd=cwd, environment=environment).finished()


def start(path, *arguments, cwd, environment=None):
    """The same process under way."""
    return Started([str(path), *map(str, arguments)], cwd, environment or {})


class Started:
    """A process under way; `kill` ends it as the system does when it runs out of memory."""

    def __init__(self, arguments, cwd, environment):
        self.arguments = arguments
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = SERVER.Process(target=_script, args=(arguments, str(cwd), environment, self.files))
        self.process.start()

    @property
    def is_running(self):
        return self.process.is_alive()

    def send(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        return self.finished()

    def finished(self):
        with self.folder:
            self.process.join(LIMIT)
            if self.process.exitcode is None:
                self.process.kill()
                raise subprocess.TimeoutExpired(self.arguments, LIMIT)
            told = (file.read_text() if file.exists() else "" for file in self.files)
            return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *told)


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
