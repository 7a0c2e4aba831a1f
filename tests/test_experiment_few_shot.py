"""The main job with tiny arguments: results, pictures, loading, interruption, and one-line errors."""

import importlib.util
import json
import os
import re
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import processes
import pytest
import torch
from scripts import call

from vma_pyro import models
from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data.prepared import write_npz
from vma_pyro.training import TrainConfig

SCRIPT = Path(__file__).parents[1] / "experiments" / "few_shot.py"
TINY = [
    "--width=0.1",
    "--latent-dim=4",
    "--classes=3",
    "--shots=2",
    "--queries=6",
    "--particles=2",
    "--eval-images=6",
    "--eval-samples=3",
    "--eval-queries=20",
    "--log-every=5",
    "--validate-every=10",
    "--validation-samples=1",
    "--accelerator=cpu",
]
PNG = b"\x89PNG"


def run(*arguments, cwd, environment=None):
    done = processes.run(SCRIPT, *arguments, cwd=cwd, environment=environment)
    return done.returncode, done.stdout + done.stderr


def figures(folder):
    timing = ("seconds", "updates_per_second")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, shared by the tests that only read it."""
    cwd = tmp_path_factory.mktemp("finished")
    code, output = run(*TINY, "--updates=30", cwd=cwd)
    assert code == 0, output
    return cwd / "runs" / "few_shot", output


def test_tiny(tmp_path):
    code, output = run("--tiny", cwd=tmp_path)
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "few_shot" / "results.json").read_text())
    assert results["nll"]["1"]["n"] == 4
    assert results["training"]["memory"]["updates"] == results["training"]["memoryless"]["updates"] == 2


def test_results(finished):
    out, output = finished
    results = json.loads((out / "results.json").read_text())
    assert set(results["nll"]) == {"1", "2", "5", "10", "19"}
    assert set(results["accuracy"]) == {"5-way 1-shot", "5-way 5-shot", "20-way 1-shot", "20-way 5-shot"}
    for estimate in (*results["nll"].values(), *results["accuracy"].values(), results["nll_memoryless"]):
        assert set(estimate) == {"mean", "se", "n"}
    assert results["nll"]["1"]["n"] == 6
    for shots in ("1", "19"):
        difference = results["nll_memoryless"]["mean"] - results["nll"][shots]["mean"]
        assert results["nll_gain"][shots]["mean"] == pytest.approx(difference)
    assert results["kl"]["kl_address"]["mean"] <= results["kl"]["log_memory"]
    assert results["kl"]["information_gained"]["n"] == 6
    assert results["kl"]["how"] == {"address": "exact", "z": "sampled"}
    assert results["kl"]["kl"]["z"] == results["kl"]["kl_z"]
    assert results["kl"]["reconstructions"]["x"] == results["kl"]["reconstruction"]
    assert results["training"]["memory"]["updates"] == results["training"]["memoryless"]["updates"] == 30
    assert results["config"]["width"] == 0.1
    assert results["command"].startswith("uv run experiments/few_shot.py --width=0.1")
    assert {"torch", "pyro", "python", "vma_pyro"} <= set(results["versions"])
    assert results["seconds"] > 0


@pytest.mark.parametrize(
    ("estimator", "names"),
    [("vimco+dreg", ["model.pt"]), ("nvil", ["checkpoint.pt"]), ("distinct+wake", ["model.pt"])],
)
def test_any_estimator_trains_and_its_checkpoint_loads(estimator, names, tmp_path):
    options = [*TINY, "--memoryless" if estimator == "distinct+wake" else "--no-memoryless"]
    code, output = run(*options, "--updates=2", f"--estimator={estimator}", cwd=tmp_path)
    assert code == 0, output
    for name in names:
        code, output = run(*TINY, f"--load=runs/few_shot/{name}", f"--out=again-{name}", cwd=tmp_path)
        assert code == 0, output


def test_training_on_with_wider_networks(finished, tmp_path):
    """And with a share of blank memories, which the file tells of."""
    given = [option for option in TINY if not option.startswith("--width")]
    more = ["--width=0.4", "--blocks=1", "--blank=0.5", "--updates=2", "--no-memoryless"]
    code, output = run(*given, f"--init={finished[0] / 'model.pt'}", *more, "--out=wider", cwd=tmp_path)
    assert code == 0, output
    facts = models.facts_of(tmp_path / "wider" / "model.pt")
    assert (facts["width"], facts["blocks"], facts["blank"]) == (0.4, 1, 0.5)
    trained = json.loads((tmp_path / "wider" / "results.json").read_text())["training"]["memory"]
    before = json.loads((finished[0] / "results.json").read_text())["training"]["memory"]["validation_nll"]
    assert trained["validation_nll_before"] == pytest.approx(before, rel=1e-4)


def test_report_is_printed_and_written(finished):
    out, output = finished
    report = (out / "report.md").read_text()
    assert report in output
    assert "information gained by the memory" in report
    for part in ("minus reconstruction of x", "KL(a), exact", "KL(z), sampled"):
        assert f"| {part} |" in report
    assert "5-way 1-shot" in report


def test_pictures(finished):
    out, _ = finished
    for name in ("samples.png", "posterior.png", "training.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_load_reports_without_training(finished, tmp_path):
    out, _ = finished
    for name in ("model.pt", "checkpoint.pt"):
        code, output = run(*TINY, f"--load={out / name}", f"--out={tmp_path / name}", cwd=tmp_path)
        assert code == 0, output
        results = json.loads((tmp_path / name / "results.json").read_text())
        trained = json.loads((out / "results.json").read_text())
        assert results["nll"] == trained["nll"]
        assert results["nll_memoryless"] == trained["nll_memoryless"]
        assert results["kl"]["information_gained"] == trained["kl"]["information_gained"]
        assert results["config"]["train"] is None
        assert not (tmp_path / name / "metrics.jsonl").exists()
        pictures = re.findall(r"`(\w+\.png)`", (tmp_path / name / "report.md").read_text())
        assert sorted(pictures) == sorted(path.name for path in (tmp_path / name).glob("*.png"))


def test_load_takes_size_and_data_from_the_checkpoint(finished, tmp_path):
    """Without the options of training: a model is scored on the data that it was trained on."""
    root = small_omniglot(tmp_path / "data")
    small = ["--eval-images=6", "--eval-samples=3", "--eval-queries=20", "--no-memoryless"]
    for name, data in (("model.pt", "data"), ("checkpoint.pt", "identity")):
        content = checkpoint.load(finished[0] / name)
        content[data] = "omniglot" if data == "data" else content[data] | {"data": "omniglot"}
        checkpoint.save(tmp_path / name, content)
        load, out = f"--load={tmp_path / name}", f"--out={tmp_path / 'out' / name}"
        code, output = run(load, out, f"--data-dir={root}", *small, cwd=tmp_path)
        assert code == 0, output
        config = json.loads((tmp_path / "out" / name / "results.json").read_text())["config"]
        assert (config["data"], config["width"], config["latent_dim"]) == ("omniglot", 0.1, 4)


def test_an_earlier_run_is_moved_aside(finished, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    code, output = run(*TINY, "--updates=2", "--no-memoryless", "--out=out", cwd=tmp_path)
    assert code == 0, output
    assert "moved the earlier run" in output
    assert (tmp_path / "out-1" / "results.json").read_text() == "mine"


def wait_for_update(path, update, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_running:
        if path.exists() and any(line["update"] >= update for line in read_metrics(path)):
            return
        time.sleep(0.02)
    raise AssertionError(process.kill().stderr)


def test_sigterm_then_sigkill_then_resume(tmp_path):
    """A run stopped by SIGTERM, killed between checkpoints and resumed gives the figures of a whole one."""
    arguments = [*TINY, "--updates=80", "--no-memoryless", "--validate-every=25"]
    code, output = run(*arguments, "--out=whole", cwd=tmp_path)
    assert code == 0, output
    arguments += ["--checkpoint-seconds=0.3"]
    metrics = tmp_path / "parts" / "metrics.jsonl"

    process = processes.start(SCRIPT, *arguments, "--out=parts", cwd=tmp_path)
    wait_for_update(metrics, 15, process)
    process.send(signal.SIGTERM)
    done = process.finished()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "go on with: uv run experiments/few_shot.py" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    stopped = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["progress"]["update"]
    assert 15 <= stopped < 65

    process = processes.start(SCRIPT, *arguments, "--out=parts", "--resume", cwd=tmp_path)
    wait_for_update(metrics, stopped + 10, process)
    assert process.kill().returncode == -signal.SIGKILL  # it was still training
    saved = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["progress"]["update"]
    assert saved < read_metrics(metrics)[-1]["update"] or saved > stopped

    code, output = run(*arguments, "--out=parts", "--resume", cwd=tmp_path)
    assert code == 0, output
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert whole["nll"] == parts["nll"]


def load_script(monkeypatch):
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("few_shot_script", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "few_shot_script", script)
    specification.loader.exec_module(script)
    return script


def small_omniglot(root):
    import numpy as np

    from vma_pyro.data import glyphs, omniglot

    images = glyphs.load(classes=24, examples=6).images
    for half, names in (
        ("background", [*omniglot.VALIDATION_ALPHABETS, "Latin", "Korean", "N_Ko"]),
        ("evaluation", ["Angelic", "Oriya", "ULOG", "Tengwar", "Keble", "Manipuri"]),
    ):
        alphabets = np.repeat(names, 4)
        write_npz(root / "omniglot" / f"{half}.npz", images=images, alphabet=alphabets, character=alphabets)
    return root


def test_omniglot(tmp_path):
    root = small_omniglot(tmp_path / "data")
    code, output = run(
        *TINY, "--updates=2", "--no-memoryless", "--data=omniglot", f"--data-dir={root}", cwd=tmp_path
    )
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "few_shot" / "results.json").read_text())
    assert set(results["nll"]) == {"1", "2", "5"}  # six examples per class
    assert results["nll_memoryless"] is None


def test_load_of_ones_own_classes(own_model, tmp_path):
    options = [*TINY, "--load=own.pt", "--no-memoryless", "--out=out"]
    code, output = run(*options, "--code=own_model.py", cwd=tmp_path)
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["latent_dim"] == 4
    for more, error in (
        (
            [],
            "error: checkpoint own.pt: expected classes of vma_pyro, got 'own_model:Soft'; if you trust its code",
        ),
        (["--code=gone.py"], "error: --code: expected a Python file, found none at gone.py"),
    ):
        code, output = run(*options, *more, cwd=tmp_path)
        assert code == 1
        assert output.splitlines()[-1].startswith(error)
    code, output = run(*TINY, "--code=own_model.py", cwd=tmp_path)
    assert output.splitlines()[-1].startswith("error: --code: expected it beside load")


class TestOneLineErrors:
    """Each ends with exit code 1 and one line that names the argument."""

    def fails(self, *arguments, cwd, environment=None):
        code, output = run(*TINY, *arguments, cwd=cwd, environment=environment)
        lines = [line for line in output.splitlines() if line]
        assert code == 1, output
        assert len(lines) == 1, output
        assert lines[0].startswith("error: ")
        return lines[0]

    def test_a_damaged_data_file(self, tmp_path):
        path = small_omniglot(tmp_path / "data") / "omniglot" / "background.npz"
        path.write_bytes(path.read_bytes()[:100])
        line = self.fails("--updates=2", "--data=omniglot", "--data-dir=data", cwd=tmp_path)
        assert "background.npz: expected a prepared npz file" in line
        assert not (tmp_path / "runs").exists()

    def test_too_few_particles(self, tmp_path):
        line = self.fails("--updates=2", "--particles=1", cwd=tmp_path)
        assert "--particles: expected at least 2 for baseline 'vimco', got 1" in line

    def test_an_unknown_estimator(self, tmp_path):
        line = self.fails("--updates=2", "--estimator=best", cwd=tmp_path)
        assert "--estimator: expected one of reinforce, nvil, vimco" in line

    def test_a_missing_checkpoint(self, tmp_path):
        assert "--load: expected a file, found none at no.pt" in self.fails("--load=no.pt", cwd=tmp_path)

    def test_networks_of_a_file_are_as_they_are(self, finished, tmp_path):
        """Also of the published one, with tiny sizes."""
        model = finished[0] / "model.pt"
        for option, known in (("--width=0.2", "0.1"), ("--latent-dim=9", "4"), ("--blocks=1", "0")):
            given = [o for o in TINY if o.split("=")[0] != option.split("=")[0]]
            code, output = run(*given, option, f"--load={model}", "--out=new", cwd=tmp_path)
            name = option[2:].split("=")[0]
            assert code == 1
            assert f"--{name}: expected that of the file beside load, {known}, got " in output

    def test_a_memoryless_checkpoint(self, finished, tmp_path):
        line = self.fails(f"--load={finished[0] / 'memoryless' / 'model.pt'}", cwd=tmp_path)
        assert line.endswith(": expected a memory model, got one of memoryless")

    def test_a_checkpoint_of_another_architecture(self, finished, tmp_path):
        content = checkpoint.load(finished[0] / "model.pt")
        networks = next(part for part in content["parts"] if "ConvNetworks" in part["class"])
        networks["arguments"]["latent_dim"] = 5
        checkpoint.save(tmp_path / "model.pt", content)
        assert "whose tensor" in self.fails("--load=model.pt", cwd=tmp_path)

    def test_a_checkpoint_of_other_images(self, finished, tmp_path):
        checkpoint.save(tmp_path / "model.pt", checkpoint.load(finished[0] / "model.pt") | {"data": "mnist"})
        line = self.fails("--load=model.pt", cwd=tmp_path)
        assert "load: expected a model of glyphs, omniglot, omniglot-45, omniglot-45-26, emnist, " in line
        assert line.endswith(", folder, got one of mnist")

    def test_resume_into_a_changed_configuration(self, tmp_path):
        code, output = run(*TINY, "--updates=2", "--no-memoryless", cwd=tmp_path)
        assert code == 0, output
        saved = (tmp_path / "runs" / "few_shot" / "checkpoint.pt").read_bytes()
        line = self.fails("--updates=2", "--no-memoryless", "--resume", "--estimator=loo", cwd=tmp_path)
        assert "resume: expected estimator = 'vimco' as in the checkpoint, got 'loo'" in line
        assert (tmp_path / "runs" / "few_shot" / "checkpoint.pt").read_bytes() == saved

    def test_a_folder_of_something_else(self, finished, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        message = "out: expected a new or empty folder, or one with an earlier run to move, got out"
        assert message in self.fails("--updates=2", "--out=out", cwd=tmp_path)
        model, results = finished[0] / "model.pt", (finished[0] / "results.json").read_text()
        assert "out: expected a new" in self.fails(f"--load={model}", f"--out={finished[0]}", cwd=tmp_path)
        assert (finished[0] / "results.json").read_text() == results

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--eval-samples=0", "error: --eval-samples: expected at least 1, got 0"),
            ("--particles=0", "error: --particles: expected at least 1, got 0"),
            ("--queries=0", "error: --queries: expected at least 1, got 0"),
            ("--particles=10000000", "error: --particles: expected an update that fits into the "),
            ("--width=nan", "error: --width: expected a finite number more than 0, got nan"),
            ("--width=1e4", "error: --width: expected networks whose weights and their gradients fit into "),
            ("--latent-dim=10000000000", "error: --latent-dim: expected networks whose weights and their "),
            ("--eval-images=1000000000000", "error: --eval-images: expected at most "),
            ("--out=.", "error: --out: expected a folder for this run alone, got ., which the present one is in"),
            ("--out=..", "error: --out: expected a folder for this run alone, got .., which the present one is "),
            ("--out=/", "error: --out: expected a folder for this run alone, got /, which the present one is in"),
            ("--out=~nobody_of_this_name/x", "error: --out: expected a home folder for ~, found none"),
            ("--latent-dim=0", "error: --latent-dim: expected at least 1, got 0"),
            ("--blocks=-1", "error: --blocks: expected at least 0, got -1"),
            ("--shots=25", "shots: expected at most 19"),
        ],
    )
    def test_bad_options_are_refused_before_anything_happens(self, tmp_path, option, message, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:  # in this process, which has imported everything
            call(load_script(monkeypatch), *TINY, "--updates=2", option)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (
                "--precision=16-mixed",
                "error: --precision: expected one of auto, 32-true, bf16-mixed, got '16-mixed'",
            ),
            ("--ema-decay=2", "error: --ema-decay: expected 0 <= ema_decay < 1, got 2.0"),
            ("--final-rate=nan", "error: --final-rate: expected a share from 0 to 1, got nan"),
            ("--minutes=inf", "error: --minutes: expected a finite number, got inf"),
            ("--seed=-1", "error: --seed: expected 0 to 2^63 - 1, got -1"),
            (f"--seed={10**30}", "error: --seed: expected 0 to 2^63 - 1, got 1000"),
            ("--patience=many", "--patience"),
        ],
    )
    def test_values_that_the_command_line_itself_refuses(self, monkeypatch, capsys, option, message):
        with pytest.raises(SystemExit) as caught:
            call(load_script(monkeypatch), *TINY, option)
        output = capsys.readouterr().err
        assert caught.value.code == 2
        assert message in output
        assert len(output.splitlines()) == 1 or "patience" in message  # tyro itself writes a frame

    def test_an_output_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        line = self.fails("--updates=2", "--out=file/out", cwd=tmp_path)
        assert "out: expected a folder that can be made, got file/out (Not a directory)" in line
        assert "out: expected a folder, got the file file" in self.fails("--out=file", cwd=tmp_path)
        assert (tmp_path / "file").read_text() == "not a folder"

    def test_resume_goes_on_with_a_run_and_with_nothing_else(self, finished, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        code, output = run(*TINY, "--updates=2", "--out=out", "--resume", cwd=tmp_path)
        assert code == 1
        assert "error: --out: expected a new or empty folder" in output
        assert os.listdir(tmp_path / "out") == ["thesis.txt"]
        line = self.fails(f"--load={finished[0] / 'model.pt'}", "--resume", "--out=new", cwd=tmp_path)
        assert "resume: expected no load beside it, as nothing is trained, got" in line

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_an_earlier_run_stays_where_it_is(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.json").write_text("mine")
        options = [option for option in TINY if "accelerator" not in option]
        code, output = run(*options, "--updates=2", "--out=out", "--accelerator=cuda", cwd=tmp_path)
        assert (code, output.strip()) == (1, "error: --accelerator: expected a GPU for cuda, found none")
        assert (tmp_path / "out" / "results.json").read_text() == "mine"

    def test_an_unwritable_output_folder(self, tmp_path, monkeypatch):
        # In this process and with a stand-in, as root may write everywhere.
        script = load_script(monkeypatch)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(SystemExit, match="^error: --out: expected a folder that can be written, got "):
            call(script, "--updates=2", f"--out={tmp_path / 'out'}")


def test_help_explains_every_option(monkeypatch):
    code, output = run("--help", cwd=Path.cwd(), environment={"COLUMNS": "120"})
    assert code == 0
    text = "\n".join(line.strip("│ ").strip() for line in output.splitlines())
    script = load_script(monkeypatch)
    options = [f.name for kind in (script.FewShotConfig, TrainConfig) for f in fields(kind) if f.name != "train"]
    for option in options:
        # The option and its values, then the explanation after two spaces or on the next line.
        pattern = rf"^--{option.replace('_', '-')}(?:, --no-\S+)?(?: \S[^\n]*?)?(?:\n| {{2,}})([A-Z][^\n]{{8,}})"
        assert re.search(pattern, text, re.MULTILINE), option


def test_checkpoints_hold_no_code(finished):
    for name in ("model.pt", "checkpoint.pt"):
        torch.load(finished[0] / name, weights_only=True)
