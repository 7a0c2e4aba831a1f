"""Training: it learns, it resumes bit for bit, it stops when told, and it never loses what it has."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from common.plots import save_training
from vma_pyro import Guide, MLPNetworks, Model
from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import Recorder, read_metrics
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO, vimco
from vma_pyro.training import TrainConfig, fit, learning_rate

CONFIG = TrainConfig(
    updates=30,
    log_every=7,
    validate_every=6,
    warmup_updates=5,
    checkpoint_seconds=1e9,
    accelerator="cpu",
    validation_samples=2,
)
TIMING = ("seconds", "updates_per_second")


@pytest.fixture(scope="module")
def characters():
    return glyphs.load(classes=12, examples=6)


def run(characters, folder, config=CONFIG, *, resume=False, hidden_dims=(8, 7), validation=True, **options):
    torch.manual_seed(0)
    networks = MLPNetworks(3, hidden_dims=hidden_dims, key_dim=5)
    model, guide = Model(networks), Guide(networks)
    episodes = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
    held_out = [EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=1).sample()] if validation else []
    elbo = MultiSampleELBO(3, baseline=vimco, max_plate_nesting=1)
    result = fit(
        model,
        guide,
        elbo,
        episodes,
        config=config,
        folder=folder,
        validation=held_out,
        resume=resume,
        show_progress=False,
        **options,
    )
    return result, {n: p.detach().clone() for n, p in elbo(model, guide).named_parameters()}


def memoryless_pair(networks):
    return MemorylessModel(networks), MemorylessGuide(networks)


def figures(folder):
    """The lines of metrics.jsonl without the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder / "metrics.jsonl")]


class StopAt:
    """Stands in for the sampler's episode number `update` being interrupted by a signal or a crash."""

    def __init__(self, monkeypatch, update, action):
        draw = EpisodeSampler.sample
        self.count = 0

        def sample(sampler):
            if sampler.classes == 3 and sampler.queries == 4 and not self.done:
                self.count += 1
                if self.count == update + 2:  # one for the validation episode, one to be inside an update
                    self.done = True
                    action()
            return draw(sampler)

        self.done = False
        monkeypatch.setattr(EpisodeSampler, "sample", sample)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_resuming_is_bit_for_bit(characters, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)  # a shell's background job ignores Ctrl-C from the start
    _, expected = run(characters, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAt(patch, 17, lambda: os.kill(os.getpid(), number))
        result, _ = run(characters, tmp_path / "parts")
    assert result.interrupted == number
    assert result.updates < 30
    assert signal.getsignal(number) == before
    result, weights = run(characters, tmp_path / "parts", resume=True)
    assert (result.interrupted, result.updates) == (0, 30)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_crash_between_checkpoints_repeats_the_lost_updates(characters, tmp_path, monkeypatch):
    """As after SIGKILL: metrics.jsonl is ahead of the last checkpoint, and its last line may be torn."""
    run(characters, tmp_path / "whole")
    with monkeypatch.context() as patch:
        StopAt(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(characters, tmp_path / "parts")

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        StopAt(patch, 12, kill)
        with pytest.raises(Killed):
            run(characters, tmp_path / "parts", resume=True)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    assert json.loads(metrics.read_text().splitlines()[-1])["update"] > 11
    metrics.write_text(metrics.read_text() + '{"update": 23, "bou')
    run(characters, tmp_path / "parts", resume=True)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_session_minutes_leave_with_a_checkpoint(characters, tmp_path):
    whole = replace(CONFIG, updates=12, validate_every=5)
    run(characters, tmp_path / "whole", whole)
    short = replace(whole, session_minutes=1e-9)
    sessions = 0
    while True:
        result, _ = run(characters, tmp_path / "parts", short, resume=True)
        sessions += 1
        if not result.interrupted:
            break
    assert sessions >= 12
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(characters, tmp_path):
    _, weights = run(characters, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    result, again = run(characters, tmp_path, resume=True)
    assert result.updates == 30
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert all((weights[name] == again[name]).all() for name in weights)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 4e-3), ("muon", 1.2e-2)])  # of very small networks
def test_it_learns_and_keeps_the_best_validated_average(optimizer, rate, characters, tmp_path):
    steps = {"optimizer": optimizer, "learning_rate": rate}
    config = replace(CONFIG, updates=120, log_every=20, validate_every=30, **steps)
    result, _ = run(characters, tmp_path, config)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    bounds = [line["bound"] for line in lines if "bound" in line]
    validation = [line["validation_nll"] for line in lines if "validation_nll" in line]
    assert bounds[-1] > bounds[0] + 100
    assert result.validation_nll == min(validation)
    assert all(0 <= line["kl_address"] <= math.log(6) + 1e-5 for line in lines if "kl_address" in line)


class Styled(nn.Module):
    """p(a) p(s) p(z) p(x | z, m_a) with a style s of another probability in the guide."""

    def __init__(self, networks, which):
        super().__init__()
        self.networks, self.which = networks, which

    def forward(self, memory, x):
        networks = self.networks
        memory = memory.encode(networks)
        with pyro.plate("data", len(x), dim=-1):
            m = memory.read(pyro.sample("address", dist.Categorical(logits=torch.zeros(memory.size))))
            pyro.sample("style", dist.Bernoulli(0.5 if self.which == "p" else 0.9))
            z = pyro.sample("z1", networks.prior(m))
            if self.which == "p":
                pyro.sample("x", dist.Bernoulli(logits=networks.decode(z, m)).to_event(3), obs=x)


@pytest.mark.parametrize("program", ["with a style", "without a memory"])
def test_metrics_have_the_kl_of_every_latent_site(program, characters, tmp_path):
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
    styled = program == "with a style"
    pair = (Styled(networks, "p"), Styled(networks, "q")) if styled else memoryless_pair(networks)
    episodes = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
    elbo = MultiSampleELBO(3, baseline=vimco, max_plate_nesting=1)
    config = replace(CONFIG, updates=2, log_every=1)
    fit(*pair, elbo, episodes, config=config, folder=tmp_path, show_progress=False)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    sites = ["address", "style", "z1"] if styled else ["z"]
    assert [[name for name in line if name.startswith("kl_")] for line in lines] == 2 * [
        [f"kl_{s}" for s in sites]
    ]
    if styled:
        expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        assert lines[-1]["kl_style"] == pytest.approx(expected, rel=1e-5)
        assert lines[-1]["kl_address"] == pytest.approx(0, abs=1e-6)
    save_training(tmp_path / "curves.png", {program: lines}, log_memory=math.log(6))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_early_stopping(characters, tmp_path):
    # A learning rate of nearly nothing does not improve the validation for long.
    config = replace(CONFIG, updates=10_000, learning_rate=1e-30, patience=2)
    result, _ = run(characters, tmp_path, config)
    assert result.updates == 3 * 6


def test_a_budget_in_minutes_ends_the_run(characters, tmp_path):
    result, _ = run(characters, tmp_path, replace(CONFIG, updates=None, minutes=0.01))
    assert not result.interrupted
    assert result.seconds >= 0.6


def test_without_validation_the_last_average_is_kept(characters, tmp_path):
    result, weights = run(characters, tmp_path, validation=False)
    assert math.isnan(result.validation_nll)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    for name, value in weights.items():
        assert (saved["weights"][name] == value).all()
        assert (saved["module"][name] != value).any()


def test_the_last_weights_are_kept_on_wish_however_they_validate(characters, tmp_path):
    """Steps that are too large make it worse; the run does not end early, and a resumed one may choose again."""
    config = replace(CONFIG, updates=24, learning_rate=0.3, patience=1, keep="last")
    result, weights = run(characters, tmp_path, config)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    nlls = [line["validation_nll"] for line in lines if "validation_nll" in line]
    assert result.updates == 24
    assert result.validation_nll == nlls[-1] > min(nlls)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    for name, value in weights.items():
        assert (saved["average"][f"module.{name}"] == value).all()
    again = replace(config, updates=48, keep="best", new_budget=True, learning_rate=0.3)
    assert run(characters, tmp_path, again, resume=True)[0].validation_nll <= nlls[-1]


def test_learning_rate_schedule():
    config = TrainConfig(updates=100, learning_rate=1.0, warmup_updates=10, final_rate=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 100, 1.0) == pytest.approx(0.1)


def test_it_trains_in_a_thread_where_signals_cannot_be_caught(characters, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(characters, tmp_path)[0]))
    thread.start()
    thread.join()
    assert results[0].updates == 30


def test_bfloat16(characters, tmp_path):
    result, _ = run(characters, tmp_path, replace(CONFIG, precision="bf16-mixed"))
    assert math.isfinite(result.validation_nll)


# TensorBoard's protobuf code has deprecation warnings of its own on some versions.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(characters, tmp_path):
    pytest.importorskip("tensorboard")
    run(characters, tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_recorder_drops_later_and_torn_lines(tmp_path):
    recorder = Recorder(tmp_path, show=False)
    for update in (5, 10, 15):
        recorder.write(update, bound=1.0)
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 20')
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15]
    Recorder(tmp_path, resume_at=10, show=False).close()
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10]


class TestNewBudget:
    def test_the_learning_rate_follows_it(self, characters, tmp_path, monkeypatch):
        config = replace(CONFIG, log_every=1)
        with monkeypatch.context() as patch:
            StopAt(patch, 15, lambda: os.kill(os.getpid(), signal.SIGTERM))
            stopped, _ = run(characters, tmp_path, config)
        shorter = replace(config, updates=20, new_budget=True)
        result, _ = run(characters, tmp_path, shorter, resume=True)
        assert (result.updates, result.interrupted) == (20, 0)
        assert list(result.budget_changes) == [stopped.updates]
        rates = [line["learning_rate"] for line in figures(tmp_path) if "learning_rate" in line]
        expected = [
            learning_rate(config, update, update / 30)
            if update < stopped.updates
            else learning_rate(shorter, update, update / 20)
            for update in range(20)
        ]
        assert rates == pytest.approx(expected)

    def test_a_finished_run_goes_on(self, characters, tmp_path):
        run(characters, tmp_path)
        longer = replace(CONFIG, updates=40, new_budget=True)
        assert run(characters, tmp_path, longer, resume=True)[0].updates == 40
        result, _ = run(characters, tmp_path, replace(longer, new_budget=False), resume=True)  # now its budget
        assert (result.updates, list(result.budget_changes)) == (40, [30])

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({"updates": 20}, "updates: expected more than the 30 that this run has had, .* got 20"),
            ({"updates": None, "minutes": 1e-9}, None),
        ],
    )
    def test_one_that_is_used_up_is_refused(self, characters, tmp_path, budget, message):
        """It counts all sessions; a rest of less than a tenth of a minute is no mistake."""
        run(characters, tmp_path)
        used_up = replace(CONFIG, new_budget=True, **budget)
        if message is None:
            assert run(characters, tmp_path, used_up, resume=True)[0].updates == 30
            return
        with pytest.raises(ValueError, match=f"^{message}$"):
            run(characters, tmp_path, used_up, resume=True)

    @pytest.mark.parametrize("stop_at", [None, 35])
    def test_without_validation_the_last_weights_count_and_not_those_of_the_first_end(
        self, characters, tmp_path, monkeypatch, stop_at
    ):
        _, first = run(characters, tmp_path, validation=False)
        longer = replace(CONFIG, updates=40, new_budget=True)
        with monkeypatch.context() as patch:
            if stop_at is not None:
                StopAt(patch, stop_at - 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
            _, found = run(characters, tmp_path, longer, resume=True, validation=False)
        content = checkpoint.load(tmp_path / "checkpoint.pt")
        assert 30 < content["progress"]["update"] <= 40
        for name, weight in found.items():
            assert torch.equal(weight, content["average"][f"module.{name}"]), name
            assert torch.equal(weight, content["weights"][name]), name
        assert any(not torch.equal(found[name], first[name]) for name in first)

    def test_with_validation_a_longer_run_is_never_worse(self, characters, tmp_path):
        first, _ = run(characters, tmp_path)
        longer = replace(CONFIG, updates=40, new_budget=True)
        result, _ = run(characters, tmp_path, longer, resume=True)
        assert result.validation_nll <= first.validation_nll

    def test_only_the_budget_may_change(self, characters, tmp_path):
        run(characters, tmp_path)
        other = replace(CONFIG, updates=40, learning_rate=0.5, new_budget=True)
        with pytest.raises(ValueError, match="^resume: expected learning_rate = 0.004 as in the checkpoint"):
            run(characters, tmp_path, other, resume=True)
        with pytest.raises(ValueError, match="^resume: expected updates = 30 .* got 40; with new_budget it may"):
            run(characters, tmp_path, replace(CONFIG, updates=40), resume=True)


class TestErrors:
    def test_another_configuration(self, characters, tmp_path):
        run(characters, tmp_path)
        with pytest.raises(
            ValueError, match="^resume: expected learning_rate = 0.004 as in the checkpoint, got 0.5$"
        ):
            run(characters, tmp_path, replace(CONFIG, learning_rate=0.5), resume=True)
        with pytest.raises(
            ValueError, match="^resume: expected data = None as in the checkpoint, got 'omniglot'$"
        ):
            run(characters, tmp_path, resume=True, identity={"data": "omniglot"})

    @pytest.mark.parametrize(
        ("then", "now", "said"),
        [
            (["first"], ["second"], "first.*: expected to be frozen as in .*checkpoint.pt, got it trained"),
            ([], ["second"], "second.*: expected to be trained as in .*checkpoint.pt, got it frozen"),
        ],
    )
    def test_other_frozen_weights(self, then, now, said, characters, tmp_path):
        def trained(frozen, **options):
            torch.manual_seed(0)
            networks = MLPNetworks(3, hidden_dims=(8, 8), key_dim=5)
            names = dict(
                zip(
                    ("first", "second"),
                    [n for n, p in networks.named_parameters() if p.dim() == 2][:2],
                    strict=True,
                )
            )
            for name in frozen:
                networks.get_parameter(names[name]).requires_grad_(False)
            episodes = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
            programs = Model(networks), Guide(networks), MultiSampleELBO(3, max_plate_nesting=1), episodes
            result = fit(*programs, config=CONFIG, folder=tmp_path, show_progress=False, **options)
            assert result.updates == CONFIG.updates
            return names

        names = trained(then)
        trained(then, resume=True)
        for short, name in names.items():
            said = said.replace(f"{short}.*", f"model.networks.{name}".replace(".", r"\."))
        with pytest.raises(ValueError, match=f"^{said}$"):
            trained(now, resume=True)

    def test_a_run_that_freezes_a_weight_on_the_way_can_be_resumed(self, characters, tmp_path, monkeypatch):
        networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
        weight = next(iter(networks.parameters()))
        programs = Model(networks), Guide(networks), MultiSampleELBO(3, max_plate_nesting=1)
        frozen = []

        def go(updates, **options):
            episodes = EpisodeSampler(characters, classes=3, shots=2, queries=4, seed=0)
            draw = episodes.sample

            def sample():
                if frozen:
                    weight.requires_grad_(False)
                frozen.append(weight.detach().clone())
                return draw()

            monkeypatch.setattr(episodes, "sample", sample)
            config = replace(CONFIG, updates=updates, new_budget="resume" in options)
            return fit(*programs, episodes, config=config, folder=tmp_path, show_progress=False, **options)

        go(6)
        weight.requires_grad_(True)
        assert go(9, resume=True).updates == 9

    def test_weights_in_another_order(self, characters, tmp_path):
        run(characters, tmp_path)
        path = tmp_path / "checkpoint.pt"
        content = checkpoint.load(path)
        names = content["trained"]
        names[2:4] = reversed(names[2:4])
        checkpoint.save(path, content)
        with pytest.raises(
            ValueError, match=f"^parameters: expected {names[2]} at place 2 as in .*, got {names[3]}$"
        ):
            run(characters, tmp_path, resume=True)

    def test_another_architecture(self, characters, tmp_path):
        run(characters, tmp_path)
        before = (tmp_path / "checkpoint.pt").read_bytes()
        with pytest.raises(
            ValueError,
            match=r"^resume: expected hidden_dims = \(8, 7\) of .*MLPNetworks as in the .*, got \(9, 7\)$",
        ):
            run(characters, tmp_path, resume=True, hidden_dims=(9, 7))
        assert (tmp_path / "checkpoint.pt").read_bytes() == before

    def test_a_run_is_not_overwritten(self, characters, tmp_path):
        run(characters, tmp_path)
        before = (tmp_path / "checkpoint.pt").read_bytes()
        with pytest.raises(
            ValueError, match="^folder: expected one without a run, found .*checkpoint.pt; resume it"
        ):
            run(characters, tmp_path)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before

    def test_weights_are_no_run(self, characters, tmp_path):
        checkpoint.save(tmp_path / "checkpoint.pt", {"weights": {}})
        with pytest.raises(ValueError, match="expected one of a training run, got weights only$"):
            run(characters, tmp_path, resume=True)

    def test_budget(self, characters, tmp_path):
        with pytest.raises(ValueError, match="^updates: expected a budget in updates or minutes, got neither$"):
            run(characters, tmp_path, replace(CONFIG, updates=None))
        with pytest.raises(ValueError, match="^minutes: expected more than 0, got -1$"):
            TrainConfig(minutes=-1)
        with pytest.raises(ValueError, match="^patience: expected at least 1, got 0$"):
            TrainConfig(patience=0)
        with pytest.raises(ValueError, match="^keep: expected one of best, last, got 'first'$"):
            TrainConfig(keep="first")

    def test_a_diverging_run_is_stopped(self, characters, tmp_path):
        with pytest.raises(FloatingPointError, match="^training: expected finite .* lower the learning rate"):
            run(characters, tmp_path, replace(CONFIG, learning_rate=1e30, warmup_updates=1, clip_norm=1e30))

    def test_weights_that_are_lost_do_not_replace_a_checkpoint(self, characters, tmp_path, monkeypatch):
        StopAt(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first, _ = run(characters, tmp_path)

        def spoil(parameters, most):
            for parameter in parameters:
                parameter.grad.fill_(math.nan)
            return torch.tensor(1.0)  # as on a GPU, where nobody looks

        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.utils.clip_grad_norm_", spoil)
            with pytest.raises(FloatingPointError, match="^training: expected finite "):
                run(characters, tmp_path, replace(CONFIG, checkpoint_seconds=1e-9), resume=True)
        assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["update"] == first.updates
        run(characters, tmp_path, resume=True)

    def test_a_full_disk_ends_neither_the_run_nor_the_checkpoint(self, characters, tmp_path, monkeypatch):
        StopAt(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first, _ = run(characters, tmp_path)
        sync, calls = os.fsync, []

        def full_until_the_end(descriptor):
            calls.append(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_until_the_end)
            config = replace(CONFIG, checkpoint_seconds=1e-9)
            with pytest.raises(OSError, match="No space left"):
                run(characters, tmp_path, config, resume=True)
        assert len(calls) > 2  # it went on after the first failure, and said so at the end
        assert os.fsync is sync
        assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["update"] == first.updates


FAULTS = """
import resource
import torch
from vma_pyro._system.allocator import keep_freed_memory

kept = keep_freed_memory()
for update in range(30):
    if update == 10:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (40, 12, 3):
        blocks = [torch.ones(megabytes * 2**18) for _ in range(2)]
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_freed_by_an_update_is_reused_by_the_next():
    # Another process: the setting is for good.
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 300  # 20 updates; each would map 110 MB afresh, 28,000 small pages or 55 huge ones
