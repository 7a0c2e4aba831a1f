"""The report: verdicts from figures, identities that fail it, results taken over, the project's README."""

import json
import math

import pytest
from scripts import PNG, refusal, run

from paper.claims import CLAIMS, RECALLS, claims
from paper.identities import identities


def figure(mean, se=0.1, n=100):
    return {"mean": mean, "se": se, "n": n}


def recall_tests(training, unseen):
    return [
        {
            "images": images,
            "memory": size,
            "log_memory": math.log(size),
            "kl_address": figure(math.log(size) - 0.01),
            "kl_z": figure(0.0),
            "nll": figure(math.log(size) + 0.1),
        }
        for images, size in (("training", training), ("unseen", unseen))
    ]


@pytest.fixture
def found():
    """Results of every experiment, in which every claim holds."""
    head = {
        "command": "uv run experiments/x.py",
        "training": {"model": {"updates": 5000, "training_seconds": 7200.0, "width": 0.5}},
        "config": {"out": "runs/x"},
        "versions": {"device": "cpu"},
    }

    def nll_rows(cells):
        return [
            {"counting": way, "classes": c, "shots": s, "address": a, "nll": figure(value), "gain": figure(3.0)}
            for (way, c, s, a), value in cells.items()
        ]

    per_class = ("shots per class", "images in all", "images in all, with replacement")
    return {
        "mnist_recall": head | {"tests": recall_tests(256, 2048)},
        **{name: head | {"tests": recall_tests(4096, 10_000)} for name in RECALLS},
        "annealing": head
        | {
            "worse_without": figure(0.1),
            "rows": [
                {"annealing": name, "nll": figure(90.0), "curve": [{"update": 1, "kl_address": 2.5}]}
                for name in ("none", "temperature")
            ],
        },
        "mnist_mixture": head
        | {
            "comparison": [
                {"data": name, "log_memory": math.log(32), "kl_address": figure(kl)}
                for name, kl in (("mnist", 1.5), ("omniglot", 2.8))
            ]
        },
        "kl_split": head
        | {
            "rows": [
                {
                    "shots": shots,
                    "log_memory": math.log(8 * shots),
                    "kl_address": figure(kl),
                    "kl_z": figure(20 - kl),
                    "nll": figure(90 - kl),
                }
                for shots, kl in ((1, 1.9), (16, 4.0))
            ]
        },
        "memory_size": head
        | {
            "rows": [
                {
                    "model": "hard",
                    "test": "all",
                    "classes": c,
                    "shots": 19,
                    "entries": 19 * c,
                    "nll": figure(90.0),
                    "excess": figure(-1.0),
                }
                for c in (1, 132)
            ]
        },
        "table1": head
        | {
            "rows": nll_rows(
                {
                    (per_class[0], 1, 1, "sampled"): 80.0,
                    (per_class[0], 1, 1, "exact"): 80.0,
                    (per_class[0], 1, 2, "sampled"): 83.0,
                    (per_class[0], 2, 1, "sampled"): 80.5,
                    (per_class[1], 2, 1, "sampled"): 97.0,
                    (per_class[0], 1, 19, "sampled"): 75.0,
                    (per_class[2], 1, 19, "sampled"): 50.0,
                }
            )
        },
        "classification": head
        | {
            "rows": [
                {"by": "guide", "among": "all alphabets", "ways": w, "shots": 1, "accuracy": figure(0.905, 0.005)}
                for w in (5, 16, 20)
            ]
        },
        "soft_attention": head
        | {
            "nll": [
                {"model": m, "classes": c, "shots": 4, "nll": figure(v), "more_than_hard": figure(v - 80)}
                for m, c, v in (
                    ("hard", 1, 80.0),
                    ("hard", 2, 80.0),
                    ("hard", 16, 80.0),
                    ("soft", 1, 81.0),
                    ("soft", 2, 82.0),
                    ("soft", 16, 85.0),
                    ("no memory", 1, 95.0),
                )
            ],
            "accuracy": [
                {"model": m, "ways": w, "shots": k, "accuracy": figure(v, 0.005)}
                for m, w, k, v in (
                    ("hard", 2, 1, 0.95),
                    ("hard", 20, 1, 0.75),
                    ("hard", 20, 5, 0.9),
                    ("soft", 2, 1, 0.93),
                    ("soft", 20, 1, 0.6),
                    ("soft", 20, 5, 0.8),
                )
            ],
        },
        "few_shot": head | {"kl": {"log_memory": math.log(32), "kl_address": figure(2.8)}},
        "benchmarks/attention": head
        | {"rows": [{"memory": s, "soft_over_hard": {"median": r}} for s, r in ((8, 0.9), (16, 1.1), (64, 1.2))]},
    }


def verdicts(found):
    return {claim.claim: claim.verdict for claim in claims(found)}


def test_every_verdict(found):
    rows = verdicts(found)
    assert rows["NLL, C = 1, 1 shot"] == "exceeded"
    assert rows["NLL, C = 1, 2 shots"] == "reproduced"  # 83.0 as in the paper
    assert rows["NLL, C = 1, 19 shots"] == "not reached: 5,000 updates, width 0.5, 2.0 h of cpu"
    assert rows["5-way 1-shot by q(a|x)"] == "reproduced"  # 90.5 +- 0.5 against 91
    assert rows["20-way 1-shot by q(a|x)"] == "exceeded"
    assert rows["16-way 1-shot by q(a|x)"] == "measured"
    rest = {k: v for k, v in rows.items() if not k.startswith(("NLL", "5-", "16-", "20-"))}
    assert set(rest.values()) == {"reproduced"}, rest
    two = next(claim for claim in claims(found) if claim.claim == "NLL, C = 2, 1 shot")
    assert (two.paper, two.reimplementation) == ("87.2", "85.2 (26 x 26)")
    assert two.ours == "80.50 ± 0.10; 97.00 ± 0.10 by images in all"


@pytest.mark.parametrize(
    ("change", "starts", "verdict"),
    [
        (
            lambda f: f["mnist_recall"]["tests"][0].update(nll=figure(27.0)),
            "Recall among 256",
            "not reached: KL(a) 0.01 and NLL 21.45",
        ),
        (lambda f: f["annealing"].update(worse_without=figure(2.0)), "No annealing", "not reached: 2.00"),
        (lambda f: f["kl_split"]["rows"][1].update(kl_z=figure(19.0)), "1 to 16 examples per class: KL(z)", "not"),
        (lambda f: f["memory_size"]["rows"][1].update(excess=figure(2.0)), "2,508 entries", "not reached: 2.00"),
        (lambda f: f["soft_attention"]["nll"][5].update(more_than_hard=figure(2.1)), "NLL of soft", "not"),
        (lambda f: f["soft_attention"]["accuracy"][4].update(accuracy=figure(0.73)), "1-shot class", "not"),
        (lambda f: f["benchmarks/attention"]["rows"][2]["soft_over_hard"].update(median=0.9), "An update", "not"),
    ],
)
def test_a_claim_that_does_not_hold(found, change, starts, verdict):
    change(found)
    assert next(v for k, v in verdicts(found).items() if k.startswith(starts)).startswith(verdict)


def test_the_causal_likelihood_has_a_column_of_its_own_and_no_verdict(found):
    other = json.loads(json.dumps(found["table1"]))
    for row in other["rows"]:
        row["nll"]["mean"] -= 25
    both = claims(found | {"table1_causal": other})
    assert [claim._replace(causal="") for claim in both] == claims(found)
    for claim in both:
        if claim.source == "table1" and claim.claim.startswith("NLL"):
            ours, causal = (float(text.split(" ")[0]) for text in (claim.ours, claim.causal))
            assert causal == pytest.approx(ours - 25)
        elif claim.source != "table1":
            assert claim.causal == ""
    names = [(i.what, i.source) for i in identities(found | {"table1_causal": other})]
    assert ("L(C) - L(1) <= log C", "table1_causal") in names


def test_what_is_not_there_is_not_measured(found):
    for name, _ in CLAIMS:
        rest = claims({k: v for k, v in found.items() if k != name})
        assert [claim.source for claim in rest if claim.verdict == "not measured"] == [name]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f["kl_split"]["rows"][0].update(kl_address=figure(2.2)), "KL(a) <= log |M|"),
        (lambda f: f["memory_size"]["rows"][1].update(excess=figure(0.4)), "L(C) - L(1) <= log C"),
        (lambda f: f["mnist_recall"]["tests"][1].update(kl_address=figure(None)), "KL(a) <= log |M|"),
        (lambda f: f["few_shot"]["kl"].update(kl_address=figure(4.1)), "KL(a) <= log |M|"),
        (lambda f: f["table1"]["rows"][3].update(nll=figure(81.6)), "L(C) - L(1) <= log C"),
        (lambda f: f["table1"]["rows"][0].update(gain=figure(-1.0)), "The bound with many samples"),
        (lambda f: f["table1"]["rows"][1].update(nll=figure(81.0)), "At |M| = 1"),
        (lambda f: f["soft_attention"]["nll"][6].update(nll=figure(80.2)), "A memory model is clearly below"),
    ],
)
def test_a_violated_identity_fails_in_red(found, change, what, tmp_path):
    assert not any(identity.violations for identity in identities(found))
    change(found)
    violated = [identity for identity in identities(found) if identity.violations]
    assert len(violated) == 1
    assert violated[0].what.startswith(what)
    put(found, tmp_path / "results")
    done = run("report", "--tiny", "--results=results", "--readme=None", cwd=tmp_path)
    assert done.returncode == 1
    assert "\033[31mVIOLATED: " + what in done.stdout
    assert done.stderr.splitlines()[-1] == "error: identities: expected all to hold, got 1 violated"
    assert '<span style="color:red">**VIOLATED** ' + what in (tmp_path / "results" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda f: f["table1"]["rows"][0].pop("nll"),
            "expected table1.json as its experiment writes it, got KeyErr",
        ),
        (lambda f: f["soft_attention"].update(nll=[]), "expected soft_attention.json as its experiment writes it"),
        (
            lambda f: f["kl_split"].update(rows=None),
            "expected kl_split.json as its experiment writes it, got TypeE",
        ),
        (
            lambda f: f["kl_split"].pop("command"),
            "expected JSON with a command in results/kl_split.json, got KeyE",
        ),
        (lambda f: f.update(kl_split=[1]), "expected JSON with a command in results/kl_split.json, got TypeError"),
    ],
)
def test_results_that_cannot_be_read(found, change, line, tmp_path):
    change(found)
    put(found, tmp_path / "results")
    assert refusal("report", "--tiny", "--results=results", "--readme=None", cwd=tmp_path).startswith(
        f"error: --results: {line}"
    )


def put(found, folder):
    for name, content in found.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def test_takes_over_and_writes_both_pages(found, tmp_path):
    table1 = found.pop("table1")
    put(found, tmp_path / "results")
    folder = tmp_path / "runs" / "table1"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(table1))
    (folder / "report.md").write_text("# Table 1\n")
    (folder / "table1.png").write_bytes(PNG)
    (folder / "training.png").write_bytes(PNG)
    (tmp_path / "README.md").write_text("a\n<!-- report: start -->\nold\n<!-- report: end -->\nb\n")
    arguments = ["--tiny", "--results=results", "--readme=README.md", "--add", "runs/table1"]
    done = run("report", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "table1.json").read_text()) == table1
    assert (tmp_path / "results" / "table1.png").exists()
    assert not (tmp_path / "results" / "training.png").exists()
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| NLL, C = 1, 1 shot | 86.5 | 85.2 (26 x 26) | 80.00 ± 0.10 ([table1](table1.md)) | exceeded |" in page
    short = (tmp_path / "README.md").read_text()
    assert short.startswith("a\n<!-- report: start -->\n| claim |")
    assert short.endswith("<!-- report: end -->\nb\n")
    assert "old" not in short
    assert "| NLL, C = 1, 1 shot | 86.5 | 80.00 ± 0.10 | exceeded |" in short
    assert "NLL, C = 2" not in short
    assert run("report", *arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "README.md").read_text() == short

    (folder / "results.json").write_text(json.dumps(table1 | {"config": {"load": "/home/me/model.pt"}}))
    line = refusal("report", *arguments, cwd=tmp_path)
    assert line == "error: --add: expected results without absolute paths, got some in runs/table1"
    (tmp_path / "README.md").write_text("nothing\n")
    line = refusal("report", *arguments[:-2], cwd=tmp_path)
    assert line.startswith("error: --readme: expected <!-- report: start -->")
