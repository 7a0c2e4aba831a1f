"""`--help` of every script: without Torch, which takes seconds to import, and no word different for it."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vma_pyro._system import quick_help

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in ("experiments", "experiments/benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "cli.run(" in path.read_text()
] + ["vma_pyro/demo/__main__.py"]


def help_of(script):
    """What a script prints when asked for help, in this process."""
    told = io.StringIO()
    path = ROOT / script
    before = sys.path[:], sys.argv[:]
    sys.path.insert(0, str(path.parent))
    sys.argv[:] = [str(path), "--help"]
    try:
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.path[:], sys.argv[:] = before
    return told.getvalue()


@pytest.fixture(scope="module")
def without_torch():
    """What all of them print in one process that never imports Torch."""
    code = f"""
import json, sys
sys.argv.append("--help")
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}, {str(ROOT / "experiments")!r}]
from vma_pyro._system import quick_help
from test_help import SCRIPTS, help_of
print(json.dumps({{script: help_of(script) for script in SCRIPTS}}))
real = [name for name, module in sys.modules.items() if name.partition(".")[0] in quick_help.HEAVY
        and not isinstance(module, quick_help.StandIn)]
assert not real, real
"""
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_same_without_torch(script, without_torch, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert len(without_torch[script]) > 200
    assert without_torch[script] == help_of(script)


def test_each_script_answers_by_itself():
    """The first import of each is the one that lets it do without Torch."""
    for script in SCRIPTS:
        imports = [
            line for line in (ROOT / script).read_text().splitlines() if line.startswith(("import", "from"))
        ]
        assert imports[1].startswith("from vma_pyro._system import quick_help"), script


def test_nothing_is_stood_in_for_without_being_asked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a_script.py", "--updates=2"])
    assert not quick_help.is_asked_for()
    monkeypatch.setattr(sys, "argv", ["a_script.py", "--help"])
    assert not quick_help.is_asked_for()  # Torch is here already
    assert not any(isinstance(finder, quick_help.Finder) for finder in sys.meta_path)
