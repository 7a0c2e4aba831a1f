"""The page of the discrete autoencoders: all runs in a folder beside the papers' figures.

The runs are those of `binary_vae.py`, each with its figures in a file of its own. The page is written beside the
folder, under its name.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
from dataclasses import dataclass
from pathlib import Path

from common import results
from discrete_vae.findings import read_runs
from discrete_vae.page import page
from vma_pyro import cli
from vma_pyro._system.command import command


@dataclass(frozen=True)
class PageConfig:
    """Make the page of all runs."""

    folder: Path = Path("experiments/results/binary_vae")
    """Folder of the runs' JSON files, and of those of `binary_vae_variance.py`."""


def main(config: PageConfig) -> None:
    """Read, and write."""
    runs = read_runs(config.folder)
    variances = [json.loads(path.read_text()) for path in sorted(config.folder.glob("variance-*.json"))]
    files = (config.folder.with_suffix(".json"), config.folder.with_suffix(".md"))
    content = {
        "command": command(),
        "runs": [run.name for run in runs],
        "updates": sum(run.updates for run in runs),
    }
    results.write_as(files, content, "Discrete autoencoders, the field's benchmark", page(runs, variances))


if __name__ == "__main__":
    cli.run(main, PageConfig, __doc__)
