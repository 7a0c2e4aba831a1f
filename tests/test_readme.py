"""Every block of the README is run: Python as it stands, commands by their options."""

import functools
import re
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(["import warnings; warnings.simplefilter('error')", *blocks("python")]))
    done = processes.run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "KL(a):" in done.stdout
    assert "5-way 1-shot:" in done.stdout


def test_the_example_is_fifteen_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 15
    assert len(README.splitlines()) < 150


@functools.cache
def help_of(script):
    return processes.run(ROOT / script, "--help", cwd=ROOT).stdout


def test_commands_name_files_and_options_that_exist():
    commands = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    assert any("uv run pytest" in line for line in commands)
    for line in commands:
        for script in re.findall(r"experiments/\S+\.py", line):
            assert (ROOT / script).exists()
            for option in re.findall(r"--[a-z-]+", line.split(script)[1]):  # those before it are torchrun's
                assert option in help_of(script), (script, option)


def test_ci_calls_the_test_command_of_the_readme():
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text()


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
