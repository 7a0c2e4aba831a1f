"""Programs that are not ours: the two examples, and what is said of a program that cannot be found."""

import importlib.util
import json
import sys
from pathlib import Path

import processes
import pytest
from scripts import call

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "estimators_on_your_model.py"
TWO = {
    "--model": "experiments.programs.two_digits:Scene",
    "--guide": "experiments.programs.two_digits:Inference",
    "--data": "experiments.programs.two_digits:data",
}


def run(*options, cwd=ROOT):
    result = processes.run(SCRIPT, *options, cwd=cwd)
    return result.returncode, result.stdout, result.stderr


def test_a_mixture(tmp_path):
    code, page, errors = run("--draws=5", "--out", str(tmp_path))
    assert code == 0, errors
    rows = {
        (r["estimator"], r["group"]): r for r in json.loads((tmp_path / "estimators.json").read_text())["rows"]
    }
    assert rows["vimco", "discrete guide"]["reference"] == "exact, by enumeration"
    assert rows["pyro-enum", "discrete guide"]["evaluations"] == 6
    assert rows["vimco", "model"]["evaluations"] == 4
    assert (tmp_path / "estimators.md").read_text().strip() == page.strip()
    assert "- gumbel-softmax: site '" in page
    assert "expected a program that reads weights" in page


def test_two_discrete_sites_and_a_continuous_one(tmp_path):
    names = ["vimco", "loo+dreg", "rloo", "wake-wake", "exact", "pyro-enum", "distinct"]
    options = [part for option in TWO.items() for part in option]
    code, page, errors = run("--draws=5", "--out", str(tmp_path), *options, "--estimators", *names)
    assert code == 0, errors
    rows = json.loads((tmp_path / "estimators.json").read_text())["rows"]
    assert {row["group"] for row in rows} == {"discrete guide", "continuous guide", "model"}
    assert {row["estimator"] for row in rows} == set(names) - {"distinct"}
    assert "- distinct: site 'second': expected a reparameterised site beside ['kind']" in page


def test_a_users_own_file_is_found_from_the_present_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pyro, torch\n"
        "import pyro.distributions as dist\n"
        "x = (torch.tensor([0.3, -1.0, 2.0]),)\n"
        "def model(x):\n"
        "    with pyro.plate('data', 3):\n"
        "        a = pyro.sample('a', dist.Bernoulli(0.5))\n"
        "        pyro.sample('x', dist.Normal(a, 1.0), obs=x)\n"
        "def guide(x):\n"
        "    with pyro.plate('data', 3):\n"
        "        pyro.sample('a', dist.Bernoulli(logits=pyro.param('slope', torch.tensor(0.1)) * x))\n"
    )
    options = ("--model", "mine:model", "--guide", "mine:guide", "--data", "mine:x", "--draws", "5")
    code, page, errors = run(*options, "--estimators", "vimco", "loo", cwd=tmp_path)
    assert code == 0, errors
    assert page.count("| vimco |") == 1  # the guide has the only parameter
    assert (tmp_path / "runs" / "your_model" / "estimators.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere:model"], "model: expected a module that can be imported, got 'nowhere'"),
        (["--model", "mixture"], "model: expected module:attribute, got 'mixture'"),
        (["--guide", "experiments.programs.mixture:Guide"], "guide: expected an attribute of"),
        (["--data", "experiments.programs.mixture:COMPONENTS"], "data: expected a tuple of arguments, got int"),
        (["--guide", "experiments.programs.mixture:COMPONENTS"], "guide: expected something to call, got int"),
        (["--draws", "1", "--estimators", "vimco"], "draws: expected at least 2, got 1"),
        (["--estimators", "best"], "estimators: expected one that fits the program, none does: {'best': "),
    ],
)
def test_bad_input_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("estimators_on_your_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit) as ended:
        call(script, "--out", str(tmp_path), *options)
    line = str(ended.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    assert message in line
