"""The discrete autoencoders with tiny arguments: programs, replays, runs that are stopped, refusals."""

import json
import math
from itertools import product

import pyro
import pytest
import torch
from scripts import call, module, refusal, run

from discrete_vae import images, programs, recorded, runs, scores
from vma_pyro.infer import ESTIMATORS, make


def tiny(**changes):
    """Model and guide of 3 bits and 7 pixels, or of others, and a batch of 4 images."""
    torch.manual_seed(3)
    mean = torch.rand(7) / 2
    architecture = programs.Architecture(**{"latents": 3, "hidden": (5,), "batch": 4, **changes})
    return programs.build(architecture, mean), (torch.rand(4, 7) < mean).float()


def log_bernoulli(logits, value):
    """log of sigma(logit)^v (1 - sigma(logit))^(1 - v), summed over the last dimension."""
    theta = logits.sigmoid()
    return (value * theta.log() + (1 - value) * (1 - theta).log()).sum(-1)


def by_hand(found, x, b, above):
    """log p(x, b) and log q(b | x) of each image; `above` are the bits of a second layer, or None."""
    model, guide = found.model, found.guide
    log_p = log_bernoulli(model.decoder(2 * b - 1), x)
    log_q = log_bernoulli(guide.encoder(x - guide.mean), b)
    if above is None:
        return log_p + log_bernoulli(model.prior, b), log_q
    log_p = log_p + log_bernoulli(model.middle(2 * above - 1), b) + log_bernoulli(model.prior, above)
    return log_p, log_q + log_bernoulli(guide.middle(2 * b - 1), above)


def log_joint(program, values, x):
    """The log probability of each image with the given values, as Pyro has it."""
    trace = pyro.poutine.trace(pyro.poutine.condition(program, data=values)).get_trace(x)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


@pytest.mark.parametrize("layers", [1, 2])
def test_programs_are_the_papers_and_scores_are_their_bounds(layers):
    pair, x = tiny(layers=layers)
    with torch.no_grad():
        pair.model.prior.copy_(torch.tensor([0.4, -1.0, 0.2]))
        got = scores.score(pair, x.to(torch.uint8), samples=3000)
        for program in pair[:2]:
            program.double()
        x, bits = x.double(), torch.tensor(list(product([0.0, 1.0], repeat=3)), dtype=torch.float64)
        log_p, log_q = [], []
        for b, above in product(bits, bits if layers == 2 else [None]):
            expected = by_hand(pair, x, b, above)
            together = {"b": b} if above is None else {"b1": b, "b2": above}
            values = {name: value.expand(len(x), 3) for name, value in together.items()}
            found = log_joint(pair.model, values, x), log_joint(pair.guide, values, x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            log_p.append(expected[0])
            log_q.append(expected[1])
    log_p, log_q = torch.stack(log_p), torch.stack(log_q)
    assert torch.allclose(log_q.logsumexp(0), torch.zeros(len(x)).double(), atol=1e-10)
    elbo = (log_q.exp() * (log_p - log_q)).sum(0).mean().item()
    evidence = log_p.logsumexp(0).mean().item()
    assert evidence - elbo > 0.1
    assert got["elbo"].mean == pytest.approx(elbo, abs=0.05)  # 12,000 samples of a standard deviation below 1
    assert got["bound"].mean == pytest.approx(evidence, abs=0.05)


def test_a_decoder_starts_at_the_mean_image():
    pair, _ = tiny()
    last = list(pair.model.decoder.modules())[-1]
    torch.testing.assert_close(last.bias.sigmoid(), pair.guide.mean.clamp(1e-3, 1 - 1e-3))


def test_a_categorical_program_reads_integers_as_one_hot_values():
    found, x = tiny(latents=2, values=5)
    guide = pyro.poutine.trace(found.guide).get_trace(x)
    value = guide.nodes["c"]["value"]
    assert value.shape == (4, 2)
    logits = []
    for given in (value, torch.eye(5)[value]):
        conditioned = pyro.poutine.condition(found.model, data={"c": given})
        logits.append(pyro.poutine.trace(conditioned).get_trace(x).nodes["x"]["fn"].base_dist.logits)
    assert torch.equal(*logits)
    trace = pyro.poutine.trace(pyro.poutine.replay(found.model, trace=guide)).get_trace(x)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], log_bernoulli(logits[0], x))
    torch.testing.assert_close(trace.nodes["c"]["log_prob"], torch.full((4,), -2 * math.log(5)))


def test_sizes_of_the_papers():
    sizes = {name: (a.latents, a.values, a.hidden, a.layers) for name, a in programs.ARCHITECTURES.items()}
    assert sizes.pop("linear") == (200, 2, (), 1)
    assert sizes.pop("nonlinear") == sizes.pop("nonlinear-rodeo") == (200, 2, (200, 200), 1)
    assert sizes.pop("two-layers") == (200, 2, (), 2)
    for name, (latents, values, hidden, layers) in sizes.items():
        assert (name, hidden, layers) == (f"{values}x{latents}", (256, 512), 1)


def test_the_protocol_of_the_authors_of_rodeo(data_folder):
    """Images are not centred, and the prior stays uniform."""
    found = images.load("mnist", data_folder)
    training = runs.Training(runs.Job("mnist", "nonlinear-rodeo", "rodeo", 2, 0), found)
    for _ in range(2):
        training.step()
    model, guide, _ = training.programs
    assert training.batches.size == 100
    assert not model.prior.any()
    assert not guide.mean.any()
    assert {group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups} == {1e-3}
    assert runs.Training(runs.Job("mnist", "nonlinear", "rloo", 2, 0), found).programs.guide.mean.any()


def gradients(names, values, steps, *, wait):
    """Gradients of the last of some updates by each estimator, and what it remembers."""
    found = []
    for name in names:
        pair, x = tiny(values=values)
        elbo = make(name, 2, site=pair.sites)
        told = []
        of = recorded.Recorded(elbo(pair.model, pair.guide), note=told.append, wait=wait)
        torch.manual_seed(5)
        for step in range(steps):
            of.gradient(x.roll(step, 0))
        found.append(([p.grad for p in of.parameters.values()], of.buffers, told))
    return found


@pytest.mark.parametrize(
    ("values", "names"),
    [(2, ("rloo", "disarm", "double-cv", "local-disarm", "reinmax")), (4, ("disarm-tree", "straight-through"))],
)
def test_replays_are_the_program_bit_for_bit(values, names):
    plain = gradients(names, values, 7, wait=100)  # the last update is a replay that is compared with nothing
    replayed = gradients(names, values, 7, wait=0)
    for (expected, theirs, _), (got, ours, told) in zip(plain, replayed, strict=True):
        assert not told
        for one, other in zip(expected, got, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_program_that_cannot_be_replayed_is_run():
    (expected, _, _), (got, _, told) = (gradients(["nvil"], 2, 4, wait=wait)[0] for wait in (100, 0))
    assert told == [
        "replays: the program cannot be recorded: it looks at the values of tensors; updates are made without them"
    ]
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_a_replay_that_differs_is_not_used():
    pair, x = tiny()
    told = []
    of = recorded.Recorded(make("rloo", 2)(pair.model, pair.guide), note=told.append, wait=0)
    of.gradient(x)
    with torch.no_grad():
        pair.model.prior += 1  # a parameter is an input
    of.gradient(x)
    assert not told
    pair.model.decoder.append(torch.nn.Tanh())  # what is recorded has none
    of.gradient(x)
    loss = of.gradient(x)  # the fourth is compared
    assert told == ["replays: replay 4 differs from the program; updates are made without them"]
    assert torch.isfinite(loss)


def test_data_is_split_and_mixed(data_folder):
    for data, sizes in (("mnist", (4416, 884, 40)), ("omniglot", None)):
        found = images.load(data, data_folder)
        assert all(part.shape[1] == 784 and part.dtype == torch.uint8 for part in found)
        if sizes is not None:
            assert tuple(map(len, found)) == sizes
        assert torch.equal(found.train, images.load(data, data_folder).train)
    with pytest.raises(ValueError, match="data: expected one of mnist, omniglot, got 'cifar'"):
        images.load("cifar", data_folder)


def test_batches_have_every_image_once():
    many = torch.arange(10, dtype=torch.uint8)[:, None]
    batches = images.Batches(many, 5, seed=0)
    first = [batches.next().flatten().tolist() for _ in range(2)]
    assert sorted([*first[0], *first[1]]) == list(range(10))
    state = batches.state_dict()
    rest = [batches.next().tolist() for _ in range(3)]
    other = images.Batches(many, 5, seed=1)
    other.load_state_dict(state)
    assert [other.next().tolist() for _ in range(3)] == rest
    with pytest.raises(ValueError, match="data_dir: expected the images that the run began with, got others"):
        images.Batches(many + 1, 5, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="data: expected at least 11 training images, got 10"):
        images.Batches(many, 11, seed=0)


def test_resumed_is_uninterrupted(data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, data = module("binary_vae"), f"--data-dir={data_folder}"
    monkeypatch.setattr(recorded.Recorded.__init__, "__kwdefaults__", {"note": print, "wait": 1})
    whole = ("--estimator", "double-cv", "arm", "--num-particles", "2", "4", "--seed=3")
    call(script, *whole, data, "--tiny", "--updates=8", "--out=whole")
    call(script, *whole, data, "--tiny", "--updates=3", "--out=parts")
    call(script, *whole, data, "--tiny", "--updates=8", "--out=parts", "--resume")
    for name in ("mnist-linear-double-cv-2-3", "mnist-linear-arm-4-3"):
        one, other = (json.loads((tmp_path / where / f"{name}.json").read_text()) for where in ("whole", "parts"))
        for content in (one, other):
            assert [row[0] for row in content["curve"]] == [3, 6, 8]
            for row in content["curve"]:
                del row[-1]  # seconds
        assert one == other
        assert (one["updates"], one["replayed"], one["evaluations"]) == (
            8,
            True,
            {"arm": 4, "double-cv": 2}[one["estimator"]],
        )
        assert one["scores"]["test"]["bound"]["n"] == 4
        assert (tmp_path / "whole" / f"{name}.json").stat().st_size < 20_000
    starts = [json.loads(p.read_text())["curve"][0][1] for p in sorted((tmp_path / "whole").glob("*.json"))]
    assert abs(starts[0] - starts[1]) < 20  # the same weights and batches, of 784 pixels


def test_stopped_by_the_clock(data_folder, tmp_path):
    arguments = ("--tiny", "--updates=8", f"--data-dir={data_folder}", "--estimator=rloo")
    done = run("binary_vae", *arguments, "--minutes=1e-9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mnist-linear-rloo-2-0: 0 of 8 updates; go on with --resume" in done.stdout
    line = refusal("binary_vae", *arguments, cwd=tmp_path)
    assert line.startswith("error: --out: expected no run of mnist-linear-rloo-2-0 in it without resume")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--estimator=dsiarm",), "--estimator: expected names among"),
        (
            ("--estimator", "arm", "disarm", "rloo", "--num-particles", "2", "4"),
            "--num-particles: expected one, or",
        ),
        (("--temperature=0.7",), "--temperature: expected none for 'disarm', got 0.7"),
        (("--model=8x4",), "site 'c': expected Bernoulli values, got Categorical"),
        (("--num-particles=1",), "--num-particles: expected at least 2 for DisARM, got 1"),
        (("--updates=0",), "--updates: expected at least 1, got 0"),
    ],
)
def test_refusals(arguments, expected, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(module("binary_vae"), *arguments, "--tiny", f"--data-dir={data_folder}")
    assert str(end.value).startswith(f"error: {expected}")


def test_all_kinds_of_estimators_train_all_models(data_folder, tmp_path):
    found = images.load("mnist", data_folder)
    schedule = runs.Schedule(2, 2, 2, 2, 2, 2, 60.0)
    for model, name in (("nonlinear", "arms"), ("two-layers", "vimco"), ("4x24", "reinmax"), ("64x8", "rloo")):
        job = runs.Job("mnist", model, name, 2, 0)
        before = runs.Training(job, found)
        after = runs.train(job, found, schedule, tmp_path)
        for one, other in zip(before.loss_fn.parameters(), after.loss_fn.parameters(), strict=True):
            assert not torch.equal(one, other)
    assert set(ESTIMATORS) >= {"arms", "vimco", "reinmax", "rloo"}


def test_categorical_models_are_named_by_values_and_latents():
    """The 4x24 of the papers has 48 bits of information, the 64x8 as many."""
    for name, bits in (("8x4", 12), ("4x24", 48), ("8x16", 48), ("64x8", 48)):
        architecture = programs.ARCHITECTURES[name]
        assert architecture.values**architecture.latents == 2**bits
