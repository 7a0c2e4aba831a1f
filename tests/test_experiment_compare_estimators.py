"""The laboratory with tiny arguments: the page, its figures, going on after an interruption, one-line errors."""

import json
from pathlib import Path

import processes
import pytest
from scripts import module

from laboratory import Quality, Training

# Of each kind one: a second mean, common noise, a control that learns. All names run in tests of their own.
FEW = ("--tiny", "--out", "out", "--estimators", "vimco+dreg+resampled", "rloo", "double-cv+common", "rebar")
SCRIPT = Path(__file__).parents[1] / "experiments" / "compare_estimators.py"


def run(*arguments, cwd):
    result = processes.run(SCRIPT, *arguments, cwd=cwd)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laboratory")
    code, output = run(*FEW, cwd=folder)
    assert code == 0, output
    return folder / "out", output


def test_the_page_answers(finished):
    out, output = finished
    page = (out / "estimators.md").read_text()
    for heading in ("In short", "Training", "The address", "Particles", "Memory size", "All figures"):
        assert f"## {heading}" in page, heading
    assert "lowest variance x time on the address: **" in page
    assert "The final, 0.02 minutes: vimco (K = 2" in page
    assert "**. Differences, paired by image:" in page
    assert "### 0.02 minutes, seed 1" in page
    assert "(seed 0), " in page
    assert "## In short" in output
    for picture in ("training.png", "final.png", "slopes.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_figures_can_be_read_again(finished):
    out, _ = finished
    content = json.loads((out / "estimators.json").read_text())
    quality = Quality.of_plain(content["stages"][0])
    assert quality.program == "toy"
    assert quality.gain("vimco") == 1
    assert quality.plain() == content["stages"][0]
    runs = [Training.of_plain(t) for t in content["training"]]
    assert [r.plain() for r in runs] == content["training"]
    # Equal numbers of decoder evaluations, within one update; two updates at least, however few VIMCO could make.
    judge, *others = runs
    evaluations = judge.updates * judge.evaluations * judge.queries
    for run in others:
        assert run.updates == max(2, round(evaluations / (run.evaluations * run.queries)))
    assert all(r.test_nll.mean > 0 for r in runs)


def test_resume_repeats_nothing(finished):
    out, _ = finished
    page = (out / "estimators.md").read_text()
    code, output = run(*FEW, "--resume", cwd=out.parent)
    assert code == 0, output

    assert (out / "estimators.md").read_text() == page


def test_a_folder_with_something_in_it_is_refused_in_one_line(finished):
    out, _ = finished
    code, output = run(*FEW, cwd=out.parent)
    assert code == 1
    assert output.strip().splitlines() == ["error: --out: expected a new or empty folder, or --resume, got out"]


def test_another_configuration_is_not_mixed_in(finished):
    out, _ = finished
    code, output = run(*FEW, "--resume", "--seed", "1", cwd=out.parent)
    assert code == 1
    (line,) = output.strip().splitlines()
    assert line == f"error: --resume: expected seed = 0 as in {Path('out') / 'config.json'}, got 1"


def test_pictures_are_drawn_again_from_the_figures(finished, tmp_path):
    out, _ = finished
    (tmp_path / "again").mkdir()
    content = (out / "estimators.json").read_text()
    (tmp_path / "again" / "estimators.json").write_text(content)
    done = processes.run(SCRIPT, "--redraw", "--out=again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for picture in ("training.png", "final.png", "slopes.png"):
        assert (tmp_path / "again" / picture).read_bytes() == (out / picture).read_bytes()


def test_a_picture_shows_six_at_most():
    """The first, the three best of the others, the middle and the worst; of each estimator its best run."""
    telling = module("compare_estimators").telling

    def training(name, nll, rate=1e-3, stopped=""):
        return Training(name, 4, 32, rate, 4.0, 0, 10, 1.0, [[10, 1.0, nll]], [], stopped=stopped)

    runs = [training("vimco", 5.0), training("vimco", 4.0, 2e-3)]
    runs += [training(name, nll) for name, nll in zip("abcdefg", (3.0, 9.0, 1.0, 2.0, 7.0, 6.0, 8.0), strict=True)]
    runs += [training("c", 20.0), training("stopped", 0.5, stopped="out of time")]
    found = telling(runs)
    assert [run.last_nll for run in found] == [5.0, 1.0, 2.0, 3.0, 6.0, 9.0]  # of 1, 2, 3, 6, 7, 8, 9
    assert telling(runs[:4]) == runs[:4]
