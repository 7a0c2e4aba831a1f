"""Training with thousands of entries, with tiny arguments: trains, goes on, tests again."""

from scripts import is_estimate, refusal, results


def test_trains_and_loads(data_folder, tmp_path):
    content = results("large_memory", "--tiny", f"--data-dir={data_folder}", cwd=tmp_path, out="a")
    assert [(row["classes"], row["shots"]) for row in content["rows"]] == [(3, 2), (3, 5)]
    for row in content["rows"]:
        assert row["updates"] == 2
        assert [cell["shots"] for cell in row["nll"]] == [1, 2]
        assert all(is_estimate(cell["nll"], n=4, low=100) for cell in row["nll"])
        assert row["entries"] == 18 * 19  # of the test classes
        assert is_estimate(row["among_all"]["right_class"], n=2, high=1.0)
    assert [(row["updates"], row["age"]) for row in content["aged"]] == [(1, 0), (1, 1)]
    assert content["aged"][0]["recall"] == 1.0

    again = results("large_memory", "--tiny", f"--data-dir={data_folder}", "--load=a", cwd=tmp_path, out="b")
    assert [row["nll"] for row in again["rows"]] == [row["nll"] for row in content["rows"]]
    resumed = results("large_memory", "--tiny", f"--data-dir={data_folder}", "--resume", cwd=tmp_path, out="a")
    assert resumed["rows"] == content["rows"]

    line = refusal("large_memory", "--memories", "2000", "4", f"--data-dir={data_folder}", cwd=tmp_path)
    assert line.startswith("error: --memories: expected 1 to 6, the classes of the data set, got 2000")
