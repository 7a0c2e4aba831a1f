"""Classification with tiny arguments: every task, by guide, likelihood and attention."""

from scripts import is_estimate, refusal, results


def test_every_task(data_folder, untrained, tmp_path):
    content = results(
        "classification",
        "--tiny",
        f"--load={untrained / 'memory.pt'}",
        f"--soft={untrained / 'soft.pt'}",
        f"--data-dir={data_folder}",
        cwd=tmp_path,
        out="a",
    )
    tasks = [(r["by"], r["among"], r["ways"], r["shots"]) for r in content["rows"]]
    assert len(tasks) == len(set(tasks)) == 3 * 2 * 2
    for task, row in zip(tasks, content["rows"], strict=True):
        assert is_estimate(row["accuracy"], n=4 if task[0] == "likelihood" else 6, high=1)
    assert set(content["training"]) == {"hard", "soft"}


def test_more_ways_than_an_alphabet_has(data_folder, untrained, tmp_path):
    line = refusal(
        "classification",
        f"--load={untrained / 'memory.pt'}",
        f"--data-dir={data_folder}",
        "--ways",
        "4",
        "--images=6",
        cwd=tmp_path,
    )
    assert line == "error: --ways: expected at most 3, the classes of the largest alphabet, got (4,)"


def test_a_hard_model_has_no_soft_attention(data_folder, untrained, tmp_path):
    hard = untrained / "memory.pt"
    arguments = [f"--load={hard}", f"--soft={hard}", f"--data-dir={data_folder}", "--tiny"]
    for name in ("classification", "memory_size"):
        line = refusal(name, *arguments, cwd=tmp_path)
        assert line.startswith(f"error: checkpoint {hard}: expected a soft or soft-guided model, got ")
