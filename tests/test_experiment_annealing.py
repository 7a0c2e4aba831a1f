"""Annealing with tiny arguments: two runs alike but for the temperature, which falls as it should."""

import pytest
import torch
from scripts import is_estimate, module, refusal, results


def test_two_runs(data_folder, tmp_path):
    content = results("annealing", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    plain, annealed = content["rows"]
    assert (plain["annealing"], annealed["annealing"]) == ("none", "temperature")
    for row in content["rows"]:
        assert is_estimate(row["nll"], n=4, low=100)
        assert [line["update"] for line in row["curve"] if "kl_address" in line] == [1, 2]
    assert plain["curve"][0]["kl_address"] != annealed["curve"][0]["kl_address"]
    again = results("annealing", "--tiny", f"--data-dir={data_folder}", "--load=a", cwd=tmp_path, out="b")
    assert again["rows"] == content["rows"]
    line = refusal("annealing", "--updates=None", "--minutes=1", cwd=tmp_path)
    assert line.startswith("error: --updates: expected a budget in updates")


def test_the_temperature_falls_in_training_only():
    annealing = module("annealing")

    class Nothing:
        def sample(self):
            return None

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    tempered = annealing.Tempered()
    falling = annealing.Falling(Nothing(), tempered, 16.0, 4)
    seen = []
    for _ in range(6):
        falling.sample()
        seen.append(tempered.temperature)
    assert seen == pytest.approx([16, 8, 4, 2, 1, 1])
    other = annealing.Falling(Nothing(), tempered, 16.0, 4)
    other.load_state_dict(falling.state_dict() | {"drawn": torch.tensor(2)})
    other.sample()
    assert tempered.temperature == pytest.approx(4)

    query, keys = torch.randn(2, 3), torch.randn(5, 3)
    assert torch.equal(tempered.eval()(query, keys), tempered.similarity(query, keys))
    torch.testing.assert_close(tempered.train()(query, keys), tempered.similarity(query, keys) / 4)
