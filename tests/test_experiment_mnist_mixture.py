"""Mixtures on MNIST with tiny arguments: three kinds of mixture, and KL(a) on two data sets."""

import math

from scripts import is_estimate, results


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
