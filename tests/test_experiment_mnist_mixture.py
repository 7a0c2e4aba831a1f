"""Mixtures on MNIST with tiny arguments: three kinds of mixture, and KL(a) on two data sets."""

import math

import numpy as np
from scripts import is_estimate, module, refusal, results

from vma_pyro.data import LabelledImages


def test_mixtures_and_comparison(data_folder, tmp_path):
    content = results("mnist_mixture", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    kinds = {row["kind"]: row for row in content["mixtures"]}
    assert list(kinds) == ["uniform", "prior", "entries"]
    for row in kinds.values():
        assert is_estimate(row["nll"], n=4, low=100)
        assert 1 <= row["perplexity_of_prior"] <= 5 + 1e-4
    assert abs(kinds["uniform"]["perplexity_of_prior"] - 5) < 1e-4
    by_data = {row["data"]: row for row in content["comparison"]}
    assert set(by_data) == {"mnist", "omniglot"}
    assert all(0 <= row["kl_address"]["mean"] <= math.log(2) for row in by_data.values())
    again = results("mnist_mixture", "--tiny", f"--data-dir={data_folder}", "--load=a", cwd=tmp_path, out="b")
    assert (again["mixtures"], again["comparison"]) == (content["mixtures"], content["comparison"])


def test_compares_with_omniglot_only(tmp_path):
    line = refusal("mnist_mixture", "--tiny", "--data=glyphs", cwd=tmp_path)
    assert line == "error: --data: expected omniglot, which MNIST is compared with, got glyphs"


def test_every_part_has_all_digits_though_the_file_is_sorted():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 600)
    images = np.zeros((6000, 28, 28), np.uint8)
    images[np.arange(6000), 0, labels] = 1
    parts = module("mnist_mixture").split_images(LabelledImages(images, labels), 64)
    assert [len(part) for part in parts] == [64, 936, 5000]
    for part in parts:
        assert set(part[:, 0].argmax(1)) == set(range(10))
