"""Two processes do what one does: gradients, training, memories that are shared out."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from two_processes import ENTRIES, addressed, episodes, gradients, looked_up

from vma_pyro._system.ranks import Ranks
from vma_pyro.training.processes import take_share

HERE = Path(__file__).parent


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def side_by_side(script, *arguments, cwd):
    """What torchrun does, seconds sooner: two processes that are told of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [meeting | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    started = [processes.start(script, *arguments, cwd=cwd, environment=rank) for rank in ranks]
    return [process.finished() for process in started]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for result in side_by_side(HERE / "two_processes.py", folder, cwd=folder):
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("memory", ["shared", "own"])
def test_the_gradient_is_that_of_one_process_with_all_images(memory, found, tmp_path):
    alone = gradients(tmp_path, memory == "shared")
    for process in found:
        assert process[memory].keys() == alone.keys()
        difference = sum((process[memory][name] - expected).square().sum() for name, expected in alone.items())
        length = sum(expected.square().sum() for expected in alone.values())
        assert difference.sqrt() < 1e-5 * length.sqrt()
        assert length > 1


def test_all_processes_train_the_same_weights_with_noise_of_their_own(found):
    first, second = (process["trained"] for process in found)
    assert not torch.equal(*first["noise"])
    assert first["updates"] == 8
    assert first["nll"] == second["nll"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(found):
    for process in found:
        assert process["resumed"]["nll"] == process["trained"]["nll"]
        assert process["resumed"]["bounds"] == process["trained"]["bounds"]
        for name, weight in process["trained"]["weights"].items():
            assert torch.equal(weight, process["resumed"]["weights"][name]), name


def test_a_memory_shared_out_answers_as_a_whole_one(found):
    whole = addressed(Ranks())
    for process in (found[0]["addressed"], found[1]["addressed"]):
        assert process["size"] == ENTRIES
        for name in ("address", "labels", "entries"):
            assert torch.equal(process[name], whole[name]), name
        for name in ("log_prob", "log_prior"):
            torch.testing.assert_close(process[name], whole[name])
        torch.testing.assert_close(process["bound"], whole["bound"], atol=1e-3, rtol=0)
        # Drawn in another order: as noisy as it is with another seed.
        torch.testing.assert_close(process["sampled_bound"], whole["sampled_bound"], atol=5.0, rtol=0)
        for name in ("drawn", "drawn_prior"):  # the same addresses in both processes, from both shares
            assert torch.equal(process[name], found[0]["addressed"][name])
            assert 0 <= process[name].min() < 9 <= process[name].max() < ENTRIES


def test_inverted_lists_shared_out_find_what_whole_ones_do(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key_dtype, whole in looked_up(Ranks()).items():
        for process in (found[0]["looked_up"][key_dtype], found[1]["looked_up"][key_dtype]):
            for name in ("address", "again", "labels"):
                assert torch.equal(process[name], whole["address"]), name
            for name in ("log_prob", "log_prior"):
                torch.testing.assert_close(process[name], whole[name])
            torch.testing.assert_close(process["bound"], whole["bound"], atol=1e-3, rtol=0)
            assert torch.equal(process["drawn"], found[0]["looked_up"][key_dtype]["drawn"])
            assert (process["drawn"][..., None] == whole["address"][:, None]).any(-1).all()
            assert 0 <= process["drawn"].min() < 9 <= process["drawn"].max() < ENTRIES


def test_images_that_cannot_be_shared_out_equally_are_refused():
    with pytest.raises(ValueError, match=r"^queries: expected a multiple of 4, the number of processes, got 6$"):
        take_share(episodes(True).sample(), Ranks(0, 4))


def test_the_main_job_under_torchrun(tmp_path):
    script = str(HERE.parent / "experiments" / "few_shot.py")
    options = ["--width=0.1", "--latent-dim=4", "--classes=3", "--shots=2", "--queries=4", "--updates=4"]
    options += ["--no-memoryless", "--accelerator=cpu", "--out=out"]
    sizes = ["--eval-images=4", "--eval-samples=2", "--eval-queries=4"]
    result = torchrun(script, *options, *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.md").exists()
    assert result.stdout.count("scoring the memory model") == 1  # one process reports
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) >= 1
