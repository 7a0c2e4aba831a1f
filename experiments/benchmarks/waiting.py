"""What people wait for: the help of a script, a look at the trained model, the main job, the tests.

Each is run as people run it, with the interpreter of this environment and the threads that there are. Seconds of
processor time are those of the command and all that it starts; the peak is of the largest process.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import BenchmarkConfig, write

from vma_pyro import cli
from vma_pyro._system.markdown import table

ROOT = Path(__file__).resolve().parents[2]
FEW_SHOT = "experiments/few_shot.py"


@dataclass(frozen=True)
class WaitingConfig(BenchmarkConfig):
    """Time commands from start to end."""

    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    what: tuple[str, ...] = ("help", "pretrained", "main job", "tests")
    """Which of them to run."""
    repetitions: int = 1
    """Runs of each; the shortest counts."""


def commands(config: WaitingConfig, out: str) -> dict[str, list[str]]:
    """The command of each, without the interpreter."""
    data = [] if config.data_dir is None else ["--data-dir", str(config.data_dir.resolve())]
    found = {
        "help": [FEW_SHOT, "--help"],
        "pretrained": [FEW_SHOT, "--load", "pretrained", *data, "--out", f"{out}/pretrained"],
        "main job": [FEW_SHOT, "--out", f"{out}/main"],
        "tests": ["-m", "pytest", "-q"],
    }
    # As small as it gets: nothing but their help.
    return {name: [*words, "--help"] for name, words in found.items()} if config.tiny else found


def measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command: seconds, seconds of processor time, GiB of its largest process.

    Raises:
        ValueError: it fails.
    """
    done = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("one_command.py"), sys.executable, *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    code, last = found.pop("code"), found.pop("last_line")
    if code:
        raise ValueError(f"what: expected {' '.join(command)} to end well, got {last}")
    return found


def main(config: WaitingConfig) -> None:
    """Run all, and write."""
    with tempfile.TemporaryDirectory() as out:
        known = commands(config, out)
        for name in config.what:
            if name not in known:
                raise ValueError(f"what: expected some of {', '.join(known)}, got {name}")
        found: dict[str, Any] = {}
        for name in config.what:
            runs = []
            for n in range(config.repetitions):
                place = [word.replace(out, f"{out}/{n}") for word in known[name]]
                runs.append(measure(place))
            found[name] = min(runs, key=lambda run: run["seconds"])
            print(f"{name}: {found[name]['seconds']:.1f} s")
    lines = [
        [
            name,
            f"`{' '.join(told(word, config, out) for word in known[name])}`",
            f"{run['seconds']:.1f}",
            f"{run['processor_seconds']:.1f}",
            f"{run['peak_gib']:.2f}",
        ]
        for name, run in found.items()
    ]
    head = ["", "command, after python", "seconds", "processor seconds", "peak GiB"]
    about = f"The shortest of {config.repetitions}." if config.repetitions > 1 else "One run each."
    write(
        config.output,
        "waiting",
        "What people wait for",
        {"runs": found},
        [about, table(head, lines)],
        device=torch.device("cpu"),
    )


def told(word: str, config: WaitingConfig, out: str) -> str:
    """A word of a command as a page says it: without folders of this machine."""
    if config.data_dir is not None and word == str(config.data_dir.resolve()):
        return str(config.data_dir)
    return word.replace(out, "OUT")


if __name__ == "__main__":
    cli.run(main, WaitingConfig, __doc__)
