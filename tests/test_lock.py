"""A folder belongs to one job at a time, however many begin at once and however they end."""

import os
import re
import time
from pathlib import Path

import processes
import pytest
import torch

from vma_pyro import Guide, MLPNetworks, Model
from vma_pyro._system import lock
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training import TrainConfig, fit

FEW_SHOT = Path(__file__).parents[1] / "experiments" / "few_shot.py"
HOLDER = """
import sys, time
from pathlib import Path
from vma_pyro._system import lock

name, folder = sys.argv[1:]
while not Path("go").exists():
    time.sleep(0.001)
try:
    lock.take(Path(folder), argument="out")
except OSError as error:
    Path(f"{name}.refused").write_text(str(error))
else:
    Path(f"{name}.held").touch()
while not Path("done").exists():
    time.sleep(0.01)
"""


def wait_for(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.process.exitcode is None, process.finished().stderr
        time.sleep(0.01)


@pytest.fixture
def holders(tmp_path):
    """Start processes that hold a folder until they are told."""
    script, started = tmp_path / "holder.py", []
    script.write_text(HOLDER)

    def start(*folders):
        found = [
            processes.start(script, len(started) + n, folder, cwd=tmp_path) for n, folder in enumerate(folders)
        ]
        started.extend(found)
        (tmp_path / "go").touch()
        wait_for(lambda: len([*tmp_path.glob("*.refused"), *tmp_path.glob("*.held")]) == len(started))
        return found

    yield start
    (tmp_path / "done").touch()
    for process in started:
        process.finished()


def test_of_many_that_begin_at_once_exactly_one_runs(holders, tmp_path):
    holders(*["out"] * 5)
    assert len(list(tmp_path.glob("*.held"))) == 1
    for refused in tmp_path.glob("*.refused"):
        line = (
            r"out: expected a folder that no other job uses, got out, in use by process \d+ on \S+ since .*; wait"
        )
        assert re.match(line, refused.read_text())
        assert "\n" not in refused.read_text()
    assert not (tmp_path / "out").exists()  # a lock makes nothing in it


@pytest.mark.parametrize(("first", "second"), [("out", "out/part"), ("out/part", "out")])
def test_a_folder_within_one_that_is_held_is_held_too(holders, tmp_path, first, second):
    holders(first)
    holders(second)
    assert (tmp_path / "0.held").exists()
    assert (tmp_path / "1.refused").exists()


def test_others_beside_it_are_free(holders, tmp_path):
    holders("out", "out-1", "other/out")
    assert len(list(tmp_path.glob("*.held"))) == 3


def test_a_killed_holder_leaves_a_file_that_means_nothing(holders, tmp_path):
    (process,) = holders("out")
    process.kill()
    assert (tmp_path / ".out.lock").exists()
    lock.take(tmp_path / "out", argument="out")
    assert f"process {os.getpid()} " in (tmp_path / ".out.lock").read_text()
    lock.take(tmp_path / "out", argument="out")  # again, in the same process
    lock.release()
    assert not (tmp_path / ".out.lock").exists()


def test_the_lock_stays_when_the_folder_is_moved(holders, tmp_path):
    (tmp_path / "out").mkdir()
    holders("out")
    (tmp_path / "out").rename(tmp_path / "out-1")
    holders("out")
    assert (tmp_path / "1.refused").exists()


def train(folder, **options):
    torch.manual_seed(0)
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
    episodes = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    config = TrainConfig(updates=2, accelerator="cpu")
    pair = Model(networks), Guide(networks)
    elbo = MultiSampleELBO(3, max_plate_nesting=1)
    return fit(*pair, elbo, episodes, config=config, folder=folder, show_progress=False, **options)


def test_training_holds_its_folder(holders, tmp_path):
    holders("run")
    with pytest.raises(
        BlockingIOError, match=r"^folder: expected a folder that no other job uses, got .*run, in use by"
    ):
        train(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_training_within_the_job_of_its_own_process(tmp_path):
    lock.take(tmp_path / "job", argument="out")
    for part in ("job", "job/memoryless"):
        assert train(tmp_path / part).updates == 2
    lock.release()


TINY = ["--width=0.1", "--latent-dim=4", "--classes=3", "--shots=2", "--queries=6", "--particles=2"]
TINY += ["--eval-images=6", "--eval-samples=3", "--eval-queries=20", "--accelerator=cpu", "--no-memoryless"]


def test_the_main_job_is_left_alone_by_a_second_one(tmp_path):
    long = ["--updates=1000000", "--checkpoint-seconds=0", "--compile=off"]
    first = processes.start(FEW_SHOT, *TINY, *long, cwd=tmp_path)
    checkpoint = tmp_path / "runs" / "few_shot" / "checkpoint.pt"
    wait_for(checkpoint.exists, first)
    second = processes.run(FEW_SHOT, *TINY, "--updates=1", cwd=tmp_path)
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert line.startswith("error: --out: expected a folder that no other job uses, got runs/few_shot, in use by ")
    assert "few_shot.py" in line
    first.kill()
    assert checkpoint.exists()  # nobody moved it
    assert sorted(p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()) == ["few_shot"]
