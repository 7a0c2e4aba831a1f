"""Training on from weights: they are the file's, a new cycle begins, and a stopped run goes on bit for bit."""

import os
import signal

import pytest
import torch

from common.train import freeze_all_but, train_pair
from vma_pyro import ConvNetworks, Guide, Model, cli, models
from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.evaluation import log_likelihood
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training import TrainConfig
from vma_pyro.training.start import start_from

ELBO = MultiSampleELBO(3, max_plate_nesting=1)
SHAPE = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": "memory"}
STEPS = TrainConfig(
    updates=4, accelerator="cpu", validate_every=2, validation_samples=2, log_every=1, checkpoint_seconds=1e9
)


def sampler(seed):
    return EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=seed)


@pytest.fixture(scope="module")
def held_out():
    return [sampler(1).sample()]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A small model with a history of one cycle."""
    folder = tmp_path_factory.mktemp("first")
    torch.manual_seed(7)
    with torch.random.fork_rng():
        pair = models.build(SHAPE)
    facts = {"updates": 60_000, "training_seconds": 5.0}
    models.save(folder / "model.pt", pair, data="glyphs", training=facts)
    return folder / "model.pt"


def train_on(init, folder, held_out, *, config=STEPS, architecture=SHAPE, only=None, **options):
    torch.manual_seed(config.seed)
    pair = models.build(architecture)
    if only is not None:
        freeze_all_but(pair, only)
    facts = train_pair(
        pair,
        ELBO,
        sampler(0),
        config=config,
        folder=folder,
        data="glyphs",
        identity=architecture,
        validation=held_out,
        init=init,
        **options,
    )
    return pair, facts


def test_it_starts_at_the_weights_in_the_file(first, held_out, tmp_path):
    for number, init in enumerate((first, str(first))):
        (model, guide), facts = train_on(init, str(tmp_path / str(number)), held_out)
        e = held_out[0]
        nll = -log_likelihood(*models.load(first), e.memory, e.x, num_samples=2).mean().item()
        assert facts["validation_nll_before"] == pytest.approx(nll, rel=1e-5)
        start = read_metrics(tmp_path / str(number) / "metrics.jsonl")[0]
        assert (start["update"], start["validation_nll"]) == (0, facts["validation_nll_before"])
        assert facts["validation_nll"] <= nll


def test_the_published_model_is_the_word_for_it():
    networks = ConvNetworks(
        **{k: v for k, v in models.facts_of("pretrained").items() if k in ("width", "latent_dim", "refinement")}
    )
    from vma_pyro.training.start import start_from

    pair = Model(networks), Guide(networks)
    start_from("pretrained", pair)
    expected = models.as_one(models.load("pretrained")).state_dict()
    found = models.as_one(pair).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_cycles_are_counted(first, held_out, tmp_path):
    _, facts = train_on(first, tmp_path / "second", held_out)
    assert models.updates_of(facts) == "60,000 + 4"
    for name in ("model.pt", "checkpoint.pt"):
        assert models.updates_of(models.facts_of(tmp_path / "second" / name)) == "60,000 + 4"
        _, facts = train_on(tmp_path / "second" / name, tmp_path / f"third-{name}", held_out)
        assert models.updates_of(facts) == "60,000 + 4 + 4"
        assert [cycle["updates"] for cycle in facts["cycles"]] == [60_000, 4]


@pytest.mark.parametrize("stop_at", [1, 3])
def test_interrupted_and_resumed_is_the_uninterrupted_one(first, held_out, tmp_path, monkeypatch, stop_at):
    whole, facts = train_on(first, tmp_path / "whole", held_out)
    draw, count = EpisodeSampler.sample, iter(range(100))

    def sample(episodes):
        if next(count) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(episodes)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeSampler, "sample", sample)
        with pytest.raises(cli.Stopped):
            train_on(first, tmp_path / "parts", held_out)
    parts, again = train_on(first, tmp_path / "parts", held_out, resume=True)
    expected = models.as_one(whole).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models.as_one(parts).state_dict().items())
    measured = dict.fromkeys(("training_seconds", "peak_gib"), 0)
    assert again | measured == facts | measured


REFINED = {**SHAPE, "refinement": 4}


def test_a_refinement_starts_without_effect(first, held_out, tmp_path):
    networks = ConvNetworks(4, width=0.1, refinement=4)
    refined = Model(networks), Guide(networks)
    start_from(first, refined)
    plain, e = models.load(first), held_out[0]
    options = {"num_samples": 3}
    # Nearly: draws of the same image and entry are refined once, in a batch of another size.
    bounds = [log_likelihood(*pair, e.memory, e.x, **options) for pair in (plain, refined)]
    assert torch.allclose(*bounds, rtol=1e-5)
    _, facts = train_on(first, tmp_path, held_out, architecture=REFINED)
    nll = -log_likelihood(*plain, e.memory, e.x, num_samples=2).mean().item()
    assert facts["validation_nll_before"] == pytest.approx(nll, rel=1e-5)


def test_train_only_leaves_everything_else_as_it_is(first, held_out, tmp_path):
    pair, _ = train_on(first, tmp_path, held_out, architecture=REFINED, only="refinement")
    before = models.as_one(models.load(first)).state_dict()
    after = checkpoint.load(tmp_path / "checkpoint.pt")["module"]  # at the last update, whatever validation kept
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = [name for name in after if "refinement" in name and name.endswith("to_correction.bias")]
    assert new
    assert all(after[name].abs().sum() > 0 for name in new)


def test_other_files_are_refused_in_one_line(first, untrained, tmp_path, held_out):
    def refused(init, line, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
            train_on(init, tmp_path / "run", held_out, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "checkpoint.pt").exists()

    refused(
        first,
        "^checkpoint: expected the architecture of model and guide for ",
        architecture={**SHAPE, "latent_dim": 5},
    )
    refused(untrained / "memoryless.pt", "^checkpoint: expected the architecture of model and guide for ")
    refused(tmp_path / "none.pt", "^checkpoint: expected a file, found none")
    damaged = bytearray(first.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    refused(tmp_path / "damaged.pt", "expected a whole checkpoint, got a damaged file")
    checkpoint.save(tmp_path / "memory.pt", {"large_memory": {}})
    refused(
        tmp_path / "memory.pt",
        "^checkpoint .*: expected a trained model, got one with format, version, large_memory$",
    )


def test_a_run_from_weights_is_not_resumed_as_one_without(first, held_out, tmp_path):
    train_on(first, tmp_path, held_out)
    with pytest.raises(ValueError, match="^resume: expected init = '.*model.pt' as in the checkpoint, got None$"):
        train_on(None, tmp_path, held_out, resume=True)
