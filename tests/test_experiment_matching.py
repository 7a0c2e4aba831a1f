"""All images at once with tiny arguments: every rule on every kind of episodes."""

from scripts import is_estimate, refusal, results


def test_every_rule(data_folder, untrained, tmp_path):
    for n, more in enumerate(((), (f"--memoryless={untrained / 'memoryless.pt'}",))):
        arguments = ["--tiny", f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}", *more]
        content = results("matching", *arguments, cwd=tmp_path, out=f"run{n}")
        rows = [(r["rule"], r["way"], r["split"], r["among"]) for r in content["rows"]]
        assert len(rows) == len(set(rows)) == 3 * 2 * 2 * 2
        assert all(is_estimate(r["accuracy"], n=2, high=1) for r in content["rows"])
        assert (tmp_path / f"run{n}" / "report.md").read_text().count(" *") == 2 * 2 + 1  # and the legend


def test_another_likelihood_is_refused(data_folder, untrained, tmp_path):
    arguments = ["--tiny", f"--data-dir={data_folder}", f"--memoryless={untrained / 'memoryless.pt'}"]
    line = refusal("matching", "--load=pretrained-causal", *arguments, cwd=tmp_path)
    assert line == "error: --memoryless: expected a model with the likelihood causal, got bernoulli"
