"""Networks that `torch.compile` has translated: in place for an update, no longer, and never a reason to fail."""

import os
import shutil
from dataclasses import replace

import processes
import pytest
import torch

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import EpisodeSampler, RecallSampler, glyphs
from vma_pyro.infer import make
from vma_pyro.retrieval import RetrievalGuide
from vma_pyro.training import TrainConfig, compiled, fit
from vma_pyro.training.compiled import Compiled, faster, is_long, networks_of
from vma_pyro.training.loss import Loss

K, B, S = 3, 5, 7


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The functions as they are, traced by torch, but not translated: that takes half a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()


def pair(networks=MLPNetworks):
    torch.manual_seed(0)
    nets = networks(4, hidden_dims=(9, 8), key_dim=6)
    return Model(nets), Guide(nets)


def loss_of(model, guide, **options):
    return Loss(make("vimco+dreg+resampled", K)(model, guide), **options)


def run_(tmp_path, config, *, resume=False, networks=MLPNetworks):
    model, guide = pair(networks)
    sampler = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    fit(model, guide, make("vimco", K), sampler, config=config, folder=tmp_path, resume=resume)
    return [p.detach() for p in model.parameters()]


CONFIG = TrainConfig(updates=4, log_every=1, accelerator="cpu", precision="32-true", compile="on")


def test_the_update_is_the_same_and_nothing_is_left_on_the_networks(random_images):
    memory, x = Memory(random_images(S)), random_images(B)
    gradients = []
    for kind in (Compiled, lambda loss: loss):
        model, guide = pair()
        before = set(vars(model.networks))
        loss = kind(loss_of(model, guide))
        torch.manual_seed(1)
        loss.gradient(memory, x)
        assert set(vars(model.networks)) == before
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


REAL = """
import torch
from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.infer import make
from vma_pyro.training import compiled
from vma_pyro.training.loss import Loss

compiled.FUNCTIONS = ("decode",)  # one, as each takes seconds
gradients, notes = [], []
for kind in (compiled.Compiled, lambda loss: loss):
    torch.manual_seed(0)
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    elbo = make("vimco+dreg+resampled", 3)
    loss = kind(Loss(elbo(Model(networks), Guide(networks)), note=notes.append))
    images = torch.rand(12, 1, 28, 28).round()
    loss.gradient(Memory(images[:7]), images[7:])
    gradients.append([p.grad for p in networks.parameters()])
print(max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(*gradients)), *notes)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif("CI" not in os.environ, reason="half a minute of a compiler's, which .ci/run waits for")
def test_a_real_compiler_computes_the_same(tmp_path):
    """In a process of its own, without the checks of shapes that tests have in them."""
    (tmp_path / "script.py").write_text(REAL)
    done = processes.run(tmp_path / "script.py", cwd=tmp_path)
    assert float(done.stdout) < 1e-4, done.stdout + done.stderr


def test_networks_are_translated_once_however_many_programs_share_them():
    model, guide = pair()
    assert networks_of(loss_of(model, guide).loss_fn) == [model.networks]
    other = Guide(pair()[0].networks)
    assert len(networks_of(loss_of(model, other).loss_fn)) == 2


def test_they_stand_in_place_while_an_update_runs(random_images):
    model, guide = pair()
    loss = Compiled(loss_of(model, guide))
    with loss.in_place():
        assert set(vars(model.networks)) >= set(compiled.FUNCTIONS)
    with pytest.raises(RuntimeError), loss.in_place():
        raise RuntimeError
    assert not set(vars(model.networks)) & set(compiled.FUNCTIONS)


@pytest.mark.parametrize("name", ["query", "decode"])
def test_a_function_of_the_networks_own_stays_on_them(name, random_images):
    model, guide = pair()
    plain = getattr(model.networks, name)

    def own(first, *more):
        return plain(1 - first, *more)

    setattr(model.networks, name, own)
    loss = Compiled(loss_of(model, guide))
    found = []
    for each in (loss.loss, loss, loss.loss):
        torch.manual_seed(1)
        found.append(each.gradient(Memory(random_images(S).mul(0)), torch.ones(B, 1, 28, 28).tril()).item())
    assert vars(model.networks)[name] is own
    assert found[0] == pytest.approx(found[1])
    assert found[0] == found[2]


def test_what_cannot_be_translated_is_run_as_it_is_and_said_once(monkeypatch, random_images):
    def fails(function, **options):
        def call(*args):
            torch.rand(3)  # noise that a failing attempt has used up
            raise RuntimeError("no C++ compiler\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    memory, x, notes = Memory(random_images(S)), random_images(B), []
    gradients = []
    for kind in (Compiled, lambda loss: loss):
        model, guide = pair()
        loss = kind(loss_of(model, guide, note=notes.append))
        torch.manual_seed(1)
        for _ in range(3):
            loss.gradient(memory, x)
        gradients.append([p.grad for p in model.parameters()])
    assert notes == ["compile: not used, no C++ compiler"]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_the_programs_own_errors_are_raised(random_images):
    class Broken(Model):
        def forward(self, memory, x=None, *, num_images=1):
            raise KeyError("mine")

    networks = pair()[0].networks
    loss = Compiled(loss_of(Broken(networks), Guide(networks), note=lambda line: None))
    with pytest.raises(KeyError, match="mine"):
        loss.gradient(Memory(random_images(S)), random_images(B))


@pytest.mark.parametrize(("seconds", "used"), [((1.0, 2.0), True), ((2.0, 2.0), False), ((3.0, 2.0), False)])
def test_it_is_used_where_an_update_takes_less_time(monkeypatch, random_images, seconds, used):
    notes = []
    model, guide = pair()
    plain = loss_of(model, guide, note=notes.append)
    with_it = Compiled(plain)
    monkeypatch.setattr(compiled, "seconds_of", lambda loss, memory, x: seconds[loss is plain])
    noise = torch.get_rng_state()
    assert faster(with_it, plain, Memory(random_images(S)), random_images(B)) is used
    assert torch.equal(torch.get_rng_state(), noise)
    ratio = seconds[0] / seconds[1]
    assert notes == [f"compile: {'used' if used else 'not used'}, {ratio:.2f} of the time of an update without"]


def test_a_trial_leaves_parameters_and_noise(random_images):
    model, guide = pair()
    plain = loss_of(model, guide, note=lambda line: None)
    before, noise = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    faster(Compiled(plain), plain, Memory(random_images(S)), random_images(B))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize(
    ("updates", "minutes", "long"),
    [(None, 19.0, False), (None, 20.0, True), (10, None, False), (4000, None, True), (4000, 1.0, False)],
)
def test_a_run_is_long_by_its_nearer_budget(monkeypatch, random_images, updates, minutes, long):
    monkeypatch.setattr(compiled, "seconds_of", lambda loss, memory, x: 0.5)
    config = TrainConfig(updates=updates, minutes=minutes)
    assert is_long(config, loss_of(*pair()), Memory(random_images(S)), random_images(B)) is long


@pytest.mark.parametrize("refresh_every", [None, 2])
def test_what_changes_in_size_with_every_update_is_not_tried(tmp_path, monkeypatch, random_images, refresh_every):
    asked = []
    monkeypatch.setattr("vma_pyro.training.run.is_long", lambda *about: asked.append(about))
    model, _ = pair()
    guide = RetrievalGuide(model.networks, candidates=5, least=K)
    sampler = RecallSampler(
        random_images(12)[:, 0].byte().numpy(), size=9, queries=4, seed=0, refresh_every=refresh_every
    )
    config = replace(CONFIG, compile="auto", updates=1)
    fit(model, guide, make("vimco", K), sampler, config=config, folder=tmp_path, show_progress=False)
    assert len(asked) == (refresh_every is None)


def test_a_resumed_run_is_made_as_it_was_begun(tmp_path, monkeypatch):
    whole = run_(tmp_path / "whole", CONFIG)
    run_(tmp_path / "parts", replace(CONFIG, session_minutes=1e-9))
    assert checkpoint.load(tmp_path / "parts/checkpoint.pt")["progress"]["is_compiled"] is True
    made = []
    monkeypatch.setattr("vma_pyro.training.run.Compiled", lambda loss: made.append(loss) or Compiled(loss))
    resumed = run_(tmp_path / "parts", CONFIG, resume=True)
    assert len(made) == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, whole, strict=True))


def test_a_short_run_is_not_translated(tmp_path):
    run_(tmp_path, replace(CONFIG, compile="auto"))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["is_compiled"] is False
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_trial_is_not_made_of_objectives_that_remember_it(tmp_path, monkeypatch):
    monkeypatch.setattr("vma_pyro.training.run.faster", pytest.fail)
    model, guide = pair()
    sampler = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    elbo = make("nvil", K)
    config = TrainConfig(minutes=60.0, session_minutes=1e-9, accelerator="cpu")
    fit(model, guide, elbo, sampler, config=config, folder=tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["is_compiled"] is False


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="compile: expected one of auto, on, off, got 'yes'"):
        TrainConfig(compile="yes")
