"""Programs of other fields with tiny arguments: what is trained, what is refused, and what the page says."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scripts import is_estimate, module, refusal, run

from common.evidence_page import NOT_YET, WHY, EvidencePage
from experiments.programs import global_mixture
from experiments.programs.interface import Field

X = torch.tensor([0.3, -1.0, 2.0])


@pytest.fixture(scope="module")
def script():
    return module("other_fields")


@pytest.fixture
def config(script):
    return script.FieldsConfig(runs=400, evaluations=4, few=5, samples=100, repeats=4)


def test_a_tiny_run_and_going_on_with_it(tmp_path):
    options = ["--tiny", "--out=a", "--programs", "switching", "global_mixture"]
    options += ["--estimators", "vimco", "disarm", "exact", "unordered-set"]
    done = run("other_fields", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    page = (tmp_path / "a" / "report.md").read_text()
    assert page in done.stdout
    assert f"`{content['command']}`" in page
    assert "nan" not in page
    switching, mixture = content["programs"]
    assert [program["program"] for program in content["programs"]] == ["switching", "global_mixture"]
    for program in content["programs"]:
        rows = {row["estimator"]: row for row in program["rows"]}
        assert list(rows) == ["(untrained)", "vimco", "disarm", "exact", "unordered-set"]
        assert program["evidence"]["se"] == 0
        for row in rows.values():
            if "refused" not in row:
                assert is_estimate(row["elbo"], n=12, low=-math.inf)
                assert is_estimate(row["few"], n=6, low=-math.inf)
                assert is_estimate(row["bound"], n=3, low=-math.inf)
        assert (rows["vimco"]["evaluations"], rows["vimco"]["updates"]) == (8, 2)
    rows = {row["estimator"]: row for row in switching["rows"]}
    assert (rows["exact"]["evaluations"], rows["exact"]["updates"]) == (64, 1)
    assert rows["unordered-set"]["refused"].startswith("site 'regime_1': expected a reparameterised site beside")
    assert [row["estimator"] for row in mixture["rows"] if "refused" in row] == [
        "disarm",
        "exact",
        "unordered-set",
    ]
    assert "disarm: refused: site 'assignment': expected Bernoulli values, got Categorical" in " ".join(
        page.split()
    )
    again = run("other_fields", *options, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "a" / "results.json").read_text())["programs"] == content["programs"]


def test_what_cannot_be_is_one_line(tmp_path):
    line = refusal("other_fields", "--tiny", "--programs=nowhere", cwd=tmp_path)
    assert "--programs: expected a module of experiments/programs with a function that makes a Field" in line
    line = refusal("other_fields", "--estimators=best", cwd=tmp_path)
    assert line.startswith("error: --estimators: expected names from reinforce, ")
    line = refusal("other_fields", "--samples=15", cwd=tmp_path)
    assert line == "error: --samples: expected a multiple of few, 10, got 15"


def test_training_comes_near_the_evidence_and_not_above(script, config):
    """Bounds are under the evidence (4.5 standard errors), and five nats nearer after 150 updates."""
    field = global_mixture.field()
    before = script.try_out((script.UNTRAINED, ""), field, config)
    config = script.replace(config, runs=600, lr=0.1)
    after = script.try_out(("rloo", ""), field, config)
    assert after["updates"] == 150
    for row in (before, after):
        for name in ("elbo", "few", "bound"):
            assert row[name]["mean"] < field.evidence + 4.5 * row[name]["se"]
    assert after["bound"]["mean"] > before["bound"]["mean"] + 5
    same = script.try_out((script.UNTRAINED, ""), field, config)
    assert same == before  # the field's own guide has learned nothing


def model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(a * pyro.param("mean", torch.tensor(1.0)), 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(0.1)) * x))


def functions(**options):
    return Field(model, guide, (X,), ("data",), "a", -5.0, 0.0, "not at all", **options)


@pytest.mark.parametrize("learns_model", [True, False])
def test_parameters_of_functions_are_trained_where_they_are_to_learn(script, config, learns_model):
    row = script.try_out(("vimco", ""), functions(learns_model=learns_model), config)
    assert "refused" not in row
    store = pyro.get_param_store()
    assert store["slope"].item() != pytest.approx(0.1)
    assert (store["mean"].item() != pytest.approx(1.0)) == learns_model


def diverging(x):
    """No number once the guide has learned something."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        as_it_began = pyro.param("slope", torch.tensor(0.1)) == torch.tensor(0.1)
        pyro.sample("x", dist.Normal(a, torch.where(as_it_began, 1.0, torch.nan)), obs=x)


def test_a_loss_that_is_no_number_ends_in_a_line(script, config):
    field = functions(learns_model=False)._replace(model=diverging)
    with pyro.validation_enabled(False):  # as in the driver
        row = script.try_out(("vimco", ""), field, config)
    assert row == {"estimator": "vimco", "refused": "the loss is nan at update 2"}


def test_the_page_sorts_and_says_who_is_near():
    page = EvidencePage(few=5, samples=100)

    def row(name, objective, elbo, few, bound, se=0.01):
        figures = {"elbo": elbo, "few": few, "bound": bound}
        facts = {"estimator": name, "objective": objective, "evaluations": 4.0, "updates": 9, "seconds": 1.0}
        return facts | {key: {"mean": mean, "se": se, "n": 4} for key, mean in figures.items()}

    rows = [
        row("far", "iwae", -30.0, -25.0, -21.0),
        row("per cent", "exact", -24.0, -21.0, -20.15),
        row("near", "elbo", -22.0, -20.5, -20.05),
        {"estimator": "none", "refused": "site 'a': expected bits"},
    ]
    evidence = {"mean": -20.0, "se": 0.03}
    program = {"program": "p", "about": "What it is.", "how": "by hand", "evidence": evidence, "rows": rows}
    untrained = row("(untrained)", "", -3000.0, -26.0, -22.0)
    cells = page.summary([program | {"rows": [untrained, *rows]}]).splitlines()[-1]
    assert cells == "| p | -20.0000 | 2.00 ± 0.03 | 1 | 3 | 1 |"
    with_untrained = page.section(program | {"rows": [untrained, *rows]})[2].splitlines()
    assert "| 3.0e+03 ± 3.2e-02 |" in with_untrained[2]
    heading, about, shown, *reasons = page.section(program)
    assert heading == "## p"
    assert "log p(data) = -20.0000 ± 0.0300 nats: by hand. 1 of 3 estimators" in about
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    assert [(line[0], line[-1]) for line in lines] == [("near", "yes"), ("per cent", "1 %"), ("far", "no")]
    assert lines[0][5:9] == ["-20.05 ± 0.01", "2.00 ± 0.03", "0.50 ± 0.03", "0.05 ± 0.03"]
    assert reasons == [
        f"per cent: {WHY['exact']}.",
        f"far: {NOT_YET}.",
        "none: refused: site 'a': expected bits.",
    ]
