"""The split of the KL with tiny arguments: trains, goes on, and tests again what it has trained."""

import math

from scripts import is_estimate, module, refusal, results


def test_trains_and_loads(data_folder, tmp_path):
    content = results("kl_split", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    assert [row["shots"] for row in content["rows"]] == [1, 2]
    for row in content["rows"]:
        assert row["log_memory"] == math.log(2 * row["shots"])
        assert is_estimate(row["kl_address"], n=4, high=row["log_memory"])
        assert is_estimate(row["nll"], n=4, low=100)
    assert [facts["updates"] for facts in content["training"].values()] == [2, 2]

    again = results("kl_split", "--tiny", f"--data-dir={data_folder}", "--load=a", cwd=tmp_path, out="b")
    assert again["rows"] == content["rows"]
    resumed = results("kl_split", "--tiny", f"--data-dir={data_folder}", "--resume", cwd=tmp_path, out="a")
    assert resumed["rows"] == content["rows"]

    line = refusal("kl_split", "--tiny", f"--data-dir={data_folder}", "--load=c", cwd=tmp_path)
    assert line.startswith("error: --load: expected a file, found none at c/models/1_examples/model.pt")


def test_every_model_trains_on_as_many_targets():
    script = module("kl_split")
    config = script.SplitConfig(queries=64, train=script.TrainConfig(updates=6000))
    for left, queries, updates in ((96, 64, 6000), (64, 64, 6000), (32, 32, 12000)):
        mine = script.as_many_targets(config, left)
        assert (mine.queries, mine.train.updates) == (queries, updates)
    timed = script.SplitConfig(queries=64, train=script.TrainConfig(minutes=5))
    assert script.as_many_targets(timed, 32).train == timed.train
