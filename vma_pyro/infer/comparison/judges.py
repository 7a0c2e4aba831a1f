"""The judge of an estimator's gradient: the best reference that a program allows, or the one asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO

from vma_pyro.infer.comparison.reference import SUMMED, EnumeratedReference
from vma_pyro.infer.comparison.subject import Subject
from vma_pyro.infer.engine.estimator import Estimator
from vma_pyro.infer.engine.pathwise import iwae
from vma_pyro.infer.engine.running import PROGRAM_ERRORS
from vma_pyro.infer.estimators.baselines import baseline_name, loo, reinforce, vimco
from vma_pyro.infer.estimators.k_sample_bound import KSampleBound
from vma_pyro.infer.estimators.multi_sample import MultiSampleELBO
from vma_pyro.infer.estimators.rloo import RLOO

MOST_RUNS = 20_000  # of the programs, where each value takes one
ASKED = ("enumeration", "long run")


class Judge(NamedTuple):
    """An objective that gives a reference gradient."""

    elbo: Any
    how: str  # for the table
    objective: str  # what it is the gradient of
    is_exact: bool = False  # whether every draw is the same
    is_own: bool = False  # whether it is the estimator itself


class Judges:
    """Finds a judge for each estimator.

    The first of these that runs: all values at once, the programs once for each value, a long run of another
    estimator of the same objective, a longer run of the estimator itself. A biased estimator of another objective
    than the K-sample or the single-sample bound is compared with the K-sample bound. `asked` is "enumeration",
    "long run", an objective, or None (the best); a sampled reference takes `draws` gradients.
    """

    def __init__(self, subject: Subject, asked: str | ELBO | None, draws: int) -> None:
        if not (asked is None or asked in ASKED or isinstance(asked, ELBO)):
            raise ValueError(f"reference: expected None, 'enumeration', 'long run' or an objective, got {asked!r}")
        self.subject, self.asked, self.draws = subject, asked, draws
        self.sites = subject.sites
        self._known: dict[Any, Judge] = {}

    def find(self, elbo: Any) -> Judge:
        """Find the judge of one estimator; refuse a reference that was asked for and cannot be had."""
        if isinstance(self.asked, ELBO):
            judge = Judge(self.asked, f"a long run of {_describe(self.asked)}", objective_of(self.asked))
            if reason := self._refused(judge):
                raise ValueError(f"reference: expected an objective that runs on these programs, got {reason}")
            return judge
        key = _kind(elbo)
        if key not in self._known:
            self._known[key] = self._first_that_runs(elbo)
        judge = self._known[key]
        return judge._replace(elbo=elbo) if judge.is_own else judge

    def _first_that_runs(self, elbo: Any) -> Judge:
        judged = judged_objective(elbo)
        reasons: list[str] = []
        if self.asked != "long run":
            for judge in self._enumerated(elbo, judged, reasons):
                reason = self._refused(judge)
                if not reason:
                    return judge
                if reason not in reasons:
                    reasons.append(reason)
            if self.asked == "enumeration":
                raise ValueError(
                    f"reference: expected discrete sites that can be enumerated for the objective {judged!r}, "
                    f"got {'; '.join(reasons)}; use 'long run'"
                )
        why = f" (not enumerated: {reasons[0]})" if reasons else ""
        for judge in self._sampled(elbo, judged):
            if not self._refused(judge):
                return judge._replace(how=judge.how + why)
        return Judge(elbo, "a longer run of itself" + why, objective_of(elbo), is_own=True)

    def _enumerated(self, elbo: Any, objective: str, reasons: list[str]) -> Iterator[Judge]:
        """Enumerate all values at once, then value by value; add why there is none to the reasons."""
        if objective not in SUMMED:
            reasons.append(f"the objective {objective!r} is no finite sum")
            return
        K = 1 if objective == "elbo" else elbo.num_particles
        exact = not self.sites.is_random_otherwise
        try:
            outcomes = K if objective.startswith("iwae") else 1
            why_not = self.sites.why_not_enumerated(outcomes, self.subject.datapoints)
        except PROGRAM_ERRORS as error:
            why_not = first_line(error)
        if why_not:
            reasons.append(why_not)
            return
        options = self._options(elbo) | {
            "sites": [site.name for site in self.sites.discrete],
            "objective": objective,
        }
        if objective not in ("iwae", "elbo"):  # whose particles may share their noise
            options["noise"] = getattr(elbo, "noise", "independent")
        if objective == "exact":
            options["sites"] = list(getattr(elbo, "sites", options["sites"]))
        if objective == "iwae-coupled":
            options["draws_per_score"] = getattr(elbo, "draws_per_score", 1)
        how = "exact, by enumeration" if exact else "discrete sites enumerated"
        if options["vectorize_particles"]:
            yield Judge(EnumeratedReference(K, **options), how, objective, exact)
        if objective in ("exact", "distinct"):
            return
        runs = self.sites.values * (2 if exact else self.draws) * (1 if options["vectorize_particles"] else K)
        if runs > MOST_RUNS:
            reasons.append(f"{runs} runs, one for each of {self.sites.values} values and draw, are too many")
            return
        yield Judge(EnumeratedReference(K, by_value=True, **options), f"{how}, value by value", objective, exact)

    def _options(self, elbo: Any) -> dict[str, Any]:
        """Give a judge the plates of the programs, and let it run particles as the estimator does."""
        return self.subject.plate_options | {"vectorize_particles": _vectorizes(elbo)}

    def _sampled(self, elbo: Any, objective: str) -> Iterator[Judge]:
        """Sample another estimator of the same objective."""
        options = self._options(elbo)
        if objective == "elbo" and not isinstance(elbo, RLOO):
            yield Judge(RLOO(8, **options), "a long run of rloo, K = 8", objective)
        if objective == "iwae":
            K = elbo.num_particles
            baseline = reinforce if K == 1 else loo
            if type(elbo) is MultiSampleELBO and elbo.pathwise == iwae and elbo.baseline is baseline:
                baseline = vimco  # another one than its own
            if baseline is not vimco or K > 1:
                judge = MultiSampleELBO(K, baseline=baseline, **options)
                yield Judge(judge, f"a long run of {baseline_name(baseline)}, K = {K}", objective)

    def _refused(self, judge: Judge) -> str:
        """Tell why a judge does not run on these programs, or ""."""
        try:
            with torch.random.fork_rng():
                gradients = self.subject.gradients(judge.elbo)
        except PROGRAM_ERRORS as error:
            return first_line(error)
        return "" if all(g.isfinite().all() for g in gradients) else "a gradient that is not finite"


def judged_objective(elbo: Any) -> str:
    """Name the objective with whose gradient an estimator is compared."""
    objective = objective_of(elbo)
    return objective if objective == "elbo" or getattr(elbo, "unbiased", True) else "iwae"


def objective_of(elbo: Any) -> str:
    """Name the objective; Pyro's own estimators name none, and are of the single-sample bound."""
    return getattr(elbo, "objective", "elbo")


def first_line(error: Exception) -> str:
    """Take the first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _kind(elbo: Any) -> Any:
    """Make the key of estimators that have the same judge."""
    own = [getattr(elbo, name, None) for name in ("noise", "draws_per_score", "sites")]
    plain = type(elbo) is MultiSampleELBO and elbo.pathwise == iwae
    itself = isinstance(elbo, RLOO) or (plain and elbo.baseline in (loo, reinforce))
    K = 1 if judged_objective(elbo) == "elbo" else elbo.num_particles
    return (judged_objective(elbo), K, _vectorizes(elbo), itself, *own)


def _vectorizes(elbo: Any) -> bool:
    # Pyro's own say False where they have one particle.
    return getattr(elbo, "vectorize_particles", True) if isinstance(elbo, Estimator) else True


def _describe(elbo: Any) -> str:
    what = type(elbo).__name__
    if isinstance(elbo, KSampleBound):
        what += f" ({baseline_name(elbo.baseline)}, {elbo.pathwise.name})"
    return f"{what}, K = {elbo.num_particles}"
