"""Comparison of likelihoods with tiny arguments; class fidelity of models that copy, and that do not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scripts import is_estimate, refusal, results
from torch import nn

from vma_pyro import Memory, models
from vma_pyro.evaluation import class_fidelity, sample_diversity


def test_every_model_has_a_row(data_folder, untrained, tmp_path):
    torch.manual_seed(0)
    architecture = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": "memory", "likelihood": "causal"}
    (tmp_path / "b").mkdir()
    models.save(tmp_path / "b" / "model.pt", models.build(architecture), data="omniglot", training={"blank": 0.1})
    content = results(
        "likelihoods",
        "--tiny",
        f"--load={untrained / 'memory.pt'}",
        f"--others={tmp_path / 'b' / 'model.pt'}",
        f"--judge={untrained / 'memory.pt'}",
        f"--data-dir={data_folder}",
        "--joint",
        "--without",
        cwd=tmp_path,
        out="a",
    )
    assert [(row["model"], row["likelihood"]) for row in content["rows"]] == [
        ("memory", "bernoulli"),
        ("b", "causal"),
    ]
    plain, other = content["rows"]
    assert "worth" not in plain
    assert "joint" not in plain
    examples = [str(shots) for shots in range(20)]
    assert list(other["nll"]) == examples
    joint = sum(other["nll"][shots]["mean"] for shots in examples) / len(examples)
    assert other["joint"]["mean"] == pytest.approx(joint)
    for shots in ("1", "2"):
        worth = other["nll"]["0"]["mean"] - other["nll"][shots]["mean"]
        assert other["worth"][shots]["mean"] == pytest.approx(worth, abs=1e-4)
    for row in content["rows"]:
        for shots in ("1", "2"):
            assert is_estimate(row["nll"][shots], n=5)
            assert is_estimate(row["refined"][shots], n=5)
        assert all(is_estimate(spread, n=2) for spread in row["diversity"].values())
        for share in (row["accuracy"], row["fidelity"]["generated"], row["fidelity"]["real"]):
            assert is_estimate(share, n=5, high=1)
    assert (tmp_path / "a" / "a.png").exists()
    assert (tmp_path / "a" / "a_samples.png").exists()


def test_more_ways_than_classes(data_folder, untrained, tmp_path):
    path = untrained / "memory.pt"
    arguments = [f"--load={path}", f"--judge={path}", f"--data-dir={data_folder}", "--ways=500"]
    assert refusal("likelihoods", *arguments, cwd=tmp_path).startswith("error: --ways: expected 2 to ")
    line = refusal("likelihoods", *arguments, f"--others={path}", cwd=tmp_path)
    assert line == "error: --others: expected models of different folders, got memory, memory"


class Nearest(nn.Module):
    """The entry with the fewest pixels that differ, nearly for sure."""

    def forward(self, memory, x):
        memory = Memory.of(memory)
        differing = (memory.entries - x.unsqueeze(1)).abs().sum((-3, -2, -1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("address", dist.Categorical(logits=-20.0 * differing))


class Copier(nn.Module):
    """Copies its only entry, or draws noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, memory, x=None, *, num_images=1):
        entries = memory.entries[:, 0]
        probs = torch.full_like(entries, 0.5) if self.noise else entries
        with pyro.plate("data", len(entries), dim=-1):
            return pyro.sample("x", dist.Bernoulli(probs).to_event(3), obs=x)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6, 1).long(), r"labels: expected int64 \[6\], got torch.int64 \[6, 1\]"),
        (torch.zeros(1).long(), r"labels: expected int64 \[6\], got torch.int64 \[1\]"),
        (torch.full((6,), 7), "labels: expected classes that are in the memory, got others"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    memory = Memory(torch.zeros(4, 1, 6, 6), torch.arange(4))
    with pytest.raises(ValueError, match=f"^{message}$"):
        class_fidelity(Copier(False), Nearest(), memory, torch.zeros(6, 1, 6, 6), labels)


@pytest.mark.parametrize("noise", [False, True])
def test_copies_are_of_their_class_and_noise_is_of_any(noise):
    """240 images among 4 classes; of noise a quarter is right, within 4 standard errors."""
    torch.manual_seed(0)
    prototypes = (torch.rand(4, 1, 6, 6) > 0.5).float()
    labels = torch.arange(4).repeat(60)
    x = (prototypes[labels] - (torch.rand(240, 1, 6, 6) < 0.02).float()).abs()
    found = class_fidelity(Copier(noise), Nearest(), Memory(prototypes, torch.arange(4)), x, labels)
    assert found.real.mean > 0.98
    assert found.generated.n == 240
    if noise:
        assert abs(found.generated.mean - 0.25) < 4 * (0.25 * 0.75 / 240) ** 0.5 + 0.05
    else:
        assert found.generated == found.real


@pytest.mark.parametrize("noise", [False, True])
def test_copies_do_not_vary_and_noise_does(noise):
    """Of 36 pixels that are tossed the variance is 9; of images with 2 % of pixels turned 36 x 0.02 x 0.98."""
    torch.manual_seed(0)
    prototypes = (torch.rand(5, 1, 1, 6, 6) > 0.5).float()
    classes = (prototypes - (torch.rand(5, 200, 1, 6, 6) < 0.02).float()).abs()
    found = sample_diversity(Copier(noise), lambda x: x.flatten(1), classes)
    assert found.real.mean == pytest.approx((36 * 0.02 * 0.98) ** 0.5, abs=0.05)
    assert found.generated.mean == pytest.approx(3.0 if noise else 0.0, abs=0.05)
    assert found.relative == pytest.approx(found.generated.mean / found.real.mean)
    assert found.generated.n == 5
    with pytest.raises(
        ValueError, match="^classes: expected .1 or more classes, 3 or more examples, C, height, width., got "
    ):
        sample_diversity(Copier(noise), lambda x: x.flatten(1), classes[:, :2])


def test_an_embedding_is_left_as_it_was_and_a_model_of_one_image_is_refused():
    embed = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)).train()
    before = {name: value.clone() for name, value in embed.state_dict().items()}
    classes = torch.rand(3, 5, 1, 6, 6).round()
    sample_diversity(Copier(True), embed, classes)
    assert embed.training
    assert all(torch.equal(value, before[name]) for name, value in embed.state_dict().items())

    def single(memory, x=None):
        return pyro.sample("x", dist.Bernoulli(torch.full((1, 1, 6, 6), 0.5)).to_event(3))

    with pytest.raises(
        ValueError, match="^model: expected as many images at its site 'x' as .* memories, 4, got 1$"
    ):
        sample_diversity(single, embed, classes)
    with pytest.raises(ValueError, match="^classes: expected .1 or more classes"):
        sample_diversity(Copier(True), embed, classes[:0])
