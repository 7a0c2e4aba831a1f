"""Every estimator on every kind of latent: exact where it claims to be, or refused in a line with the site's name.

The table in docs/what_runs_on_what.md is made of the same runs: `uv run tests/test_what_runs.py` writes it.
"""

import itertools
import math
import sys
import warnings
from functools import cache
from pathlib import Path

import pyro
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kinds import KINDS, observed, tables

from programs import RELAXED, rows
from vma_pyro._system.markdown import table
from vma_pyro.infer import ESTIMATORS, make

K, N = 2, 4000
PAGE = Path(__file__).parents[1] / "docs" / "what_runs_on_what.md"
MATCHES = {"elbo", "iwae"}  # objectives that are compared with their enumeration


@cache
def exact(kind, objective):
    """The gradients of an enumerated objective, for one datapoint."""
    p = rows(KINDS[kind].values, 1)
    log_q, log_w = (t[0] for t in tables(KINDS[kind], p))
    if objective == "elbo":
        value = (log_q.exp() * log_w).sum()
    else:
        outcome = torch.tensor(list(itertools.product(range(len(log_q)), repeat=K))).T
        value = (log_q[outcome].sum(0).exp() * (log_w[outcome].logsumexp(0) - math.log(K))).sum()
    return [g[0] for g in torch.autograd.grad(value, list(p.values()))]


@cache
def outcome(name, kind):
    """The objective, and the gradients of one draw for N datapoints; or the error."""
    shown = KINDS[kind]
    torch.manual_seed(0)
    p, sites = rows(shown.values, N), shown.sites
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            elbo = make(name, K, site=sites if takes_several(name) else sites[0], max_plate_nesting=shown.nesting)
            loss = elbo.differentiable_loss(shown.model, shown.guide, p, observed(p))
        return elbo, torch.autograd.grad(-loss, list(p.values()), allow_unused=True)
    except ValueError as error:
        return str(error), None
    except RuntimeWarning as warning:  # Pyro's own warn of what they cannot do
        assert name.startswith("pyro-")
        return str(warning), None


def takes_several(name):
    """Whether its `site` may be several."""
    return name in ("exact", "rebar", "relax", *RELAXED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_exact_or_refused(name, kind):
    """The mean over 4,000 datapoints is that of the enumerated objective; the z bound is 5."""
    elbo, gradients = outcome(name, kind)
    if gradients is None:
        assert name.startswith("pyro-") or ("\n" not in elbo and "site '" in elbo), elbo
        return
    assert all(g is None or g.isfinite().all() for g in gradients)
    if not getattr(elbo, "unbiased", True) or KINDS[kind].outcomes is None:
        return
    objective = getattr(elbo, "objective", "elbo")
    if objective not in MATCHES:
        return
    for got, want in zip(gradients, exact(kind, objective), strict=True):
        error = got.std(0) / math.sqrt(N)
        assert ((got.mean(0) - want).abs() <= 5 * error + 1e-9).all(), (got.mean(0), want)
        assert want.abs().max() > 1e-3


def page():
    """The table."""
    head = """# What runs on what

Every estimator was run on a small program of every kind of latent. A tick: it runs, and if it claims to be
unbiased, the mean of its gradient over 4,000 datapoints is that of its enumerated objective (z below 5; with a
Gaussian beside the discrete site the tests of the estimator itself say so). A dash: it is refused in one line that
names the site. Relaxed estimators, and those with control variates from the gradient of f, need a model that reads
weights in the place of values, as these do. `uv run tests/test_what_runs.py` makes this page of the contract's
runs, and the tests compare it.

"""
    lines = []
    for name in ESTIMATORS:
        found = {kind: outcome(name, kind) for kind in KINDS}
        elbo = next((elbo for elbo, gradients in found.values() if gradients is not None), None)
        unbiased = "" if getattr(elbo, "unbiased", True) else ", biased"
        marks = ["–" if gradients is None else "✓" for _, gradients in found.values()]
        lines.append([f"`{name}`", f"{getattr(elbo, 'objective', 'elbo')}{unbiased}", *marks])
    return head + table(["estimator", "objective", *(kind.shows for kind in KINDS.values())], lines) + "\n"


def test_the_page_shows_the_same():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    pyro.enable_validation(True)
    PAGE.write_text(page())
