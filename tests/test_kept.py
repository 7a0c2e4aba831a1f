"""Parts of a long job: computed once, and never mixed with those of another configuration."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from common import kept
from vma_pyro.training import TrainConfig


@dataclass(frozen=True)
class Job:
    out: Path
    resume: bool = True
    shots: tuple[int, ...] = (1, 2)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(updates=5))


def test_a_part_is_computed_once_unless_the_job_begins_anew(tmp_path):
    job = Job(tmp_path)
    assert kept.once(job, "a", lambda: {"nll": 1.5}) == {"nll": 1.5}
    assert kept.once(job, "a", lambda: {"nll": 2.5}) == {"nll": 1.5}
    assert kept.once(job, "b", lambda: {"nll": 3.5}) == {"nll": 3.5}
    assert kept.once(replace(job, resume=False), "a", lambda: {"nll": 2.5}) == {"nll": 2.5}


def test_what_a_session_may_choose(tmp_path):
    job = Job(tmp_path)
    kept.check_same(job)
    kept.check_same(replace(job, resume=False, train=replace(job.train, session_minutes=3.0, accelerator="cpu")))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shots": (1, 4)}, r"shots = \[1, 2\] as in .*config.json, got \[1, 4\]"),
        ({"train": TrainConfig(updates=6)}, r"train.updates = 5 as in .*config.json, got 6"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, line):
    job = Job(tmp_path)
    kept.check_same(job)
    for _ in range(2):  # the refusal changes nothing
        with pytest.raises(ValueError, match=f"^resume: expected {line}$"):
            kept.check_same(replace(job, **change))


def test_files_that_changed_are_refused(tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes(b"one")
    kept.check_same(Job(tmp_path), model)
    kept.check_same(Job(tmp_path), model)
    model.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"^resume: expected content of .*model.pt = "):
        kept.check_same(Job(tmp_path), model)


def test_a_damaged_part_is_refused(tmp_path):
    content = {"nll": [1.25, 2.5], "name": "a"}
    job, path = Job(tmp_path), tmp_path / "parts" / "a.json"
    kept.once(job, "a", lambda: content)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(bytes(b ^ 1 if n == place else b for n, b in enumerate(whole)))
        try:
            found = kept.once(job, "a", dict)
        except ValueError as error:
            found = str(error)
        line = f"resume: expected a whole part, got the damaged file {path}; remove it, and go on"
        assert found in (content, line)
    path.write_text('{"nll": 1.0}')  # as kept before there were checksums
    assert kept.once(job, "a", dict) == {"nll": 1.0}
