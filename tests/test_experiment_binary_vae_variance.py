"""Variances of gradients: against enumeration, and a tiny run."""

import json

import pytest
import torch
from scripts import call, module

from discrete_vae import images, programs, variance
from vma_pyro.infer import make


def test_a_variance_is_that_of_the_draws():
    gradients = torch.tensor([[1.0, 4.0], [3.0, 4.0], [2.0, 1.0]])
    found = variance.of(gradients)
    assert found.variance == pytest.approx(gradients.var(0).mean().item())
    assert found.square == pytest.approx(gradients.mean(0).square().mean().item())


def test_more_particles_and_antithetic_ones_have_less_variance():
    torch.manual_seed(0)
    found = programs.build(programs.Architecture(latents=6, batch=8), torch.full((9,), 0.4))
    x = (torch.rand(8, 9) < 0.4).to(torch.uint8)

    def measured(name, k):
        return variance.measure(make(name, k), found, images.Batches(x, 8, seed=0), draws=400, warm_up=1, seed=0)[
            "guide"
        ]

    few, many, antithetic = measured("rloo", 2), measured("rloo", 8), measured("disarm", 2)
    assert many.variance + 5 * many.se < few.variance - 5 * few.se
    assert antithetic.variance + 3 * antithetic.se < few.variance - 3 * few.se


def test_a_tiny_run(data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("--estimators", "disarm:2", "rloo:4")
    call(module("binary_vae_variance"), "--tiny", f"--data-dir={data_folder}", "--out=v", *names)
    content = json.loads((tmp_path / "v" / "variance-mnist-linear-disarm-0.json").read_text())
    cells = [(row["update"], row["estimator"], row["evaluations"]) for row in content["rows"]]
    assert cells == [(0, "disarm", 2), (0, "rloo", 4), (3, "disarm", 2), (3, "rloo", 4)]
    assert all(row[part]["variance"] > 0 for row in content["rows"] for part in ("guide", "model"))
    with pytest.raises(SystemExit) as end:
        call(module("binary_vae_variance"), "--estimators=disarm")
    assert str(end.value) == "error: --estimators: expected NAME:K, got 'disarm'"
