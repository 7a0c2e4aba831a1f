"""Experiments as a user runs them: in a process of their own, on small files of data."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import get_type_hints

import processes

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PNG = b"\x89PNG"


def run(script, *arguments, cwd):
    """The finished process of experiments/SCRIPT.py."""
    return processes.run(EXPERIMENTS / f"{script}.py", *arguments, cwd=cwd)


def results(script, *arguments, cwd, out):
    """What a successful run leaves: its results, and a report and a picture that go with them."""
    done = run(script, *arguments, f"--out={out}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    folder = cwd / out
    content = json.loads((folder / "results.json").read_text())
    page = (folder / "report.md").read_text()
    assert page in done.stdout
    assert f"`{content['command']}`" in page
    assert f"experiments/{script}.py" in content["command"]
    assert "nan" not in page
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert pictures
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(PNG)
    return content


def refusal(script, *arguments, cwd):
    """The one line in which a run ends that cannot be."""
    done = run(script, *arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def is_estimate(value, *, n, low=0.0, high=float("inf")):
    """Whether a figure is a mean with its standard error and number of images."""
    return value["n"] == n and low <= value["mean"] <= high and (value["se"] is None or value["se"] >= 0)


def module(script):
    """experiments/SCRIPT.py as a module, for what is in it."""
    spec = importlib.util.spec_from_file_location(script, EXPERIMENTS / f"{script}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[script] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def call(found, *arguments):
    """A script that is loaded as a module, run in this process with command-line arguments."""
    from vma_pyro import cli

    cli.run(found.main, get_type_hints(found.main)["config"], None, arguments)
