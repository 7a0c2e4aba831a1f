"""Which estimator for the programs at hand: what can run on them, and what is best per second."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO

from vma_pyro._system.markdown import table
from vma_pyro.infer.comparison.compare import compare, evaluations_of, matched
from vma_pyro.infer.comparison.judges import first_line
from vma_pyro.infer.comparison.sites import DiscreteSite, GuideSites, find_sites
from vma_pyro.infer.comparison.table import Comparison, Row
from vma_pyro.infer.engine.distributions import MOST_JOINT_VALUES
from vma_pyro.infer.engine.first_look import PlateNesting
from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import PROGRAM_ERRORS
from vma_pyro.infer.estimators.registry import ESTIMATORS, SOFT, make

GROUPS = ("discrete guide", "shared")  # where estimators differ most; the first that there is
BEST = 5
NO_NOISE = 1e5  # an SNR above is that of rounding


class Suggestion(NamedTuple):
    """What `suggest` found; printed, it says it in words.

    Attributes:
        sites: the latent sites of the guide.
        comparison: all figures of the estimators that run on the programs.
        group: the group of parameters by which they are ranked.
        left_out: why the others do not run, by name.
    """

    sites: GuideSites
    comparison: Comparison
    group: str
    left_out: dict[str, str]

    def ranked(self, *, unbiased: bool = True) -> list[Row]:
        """Sort the rows of the group by their signal-to-noise ratio in one second, the best first.

        Those of no noise at all come first; those that do not train the group are left out.
        """
        rows = [r for r in self.comparison.rows if r.group == self.group and r.claims_unbiased == unbiased]
        return sorted(
            (r for r in rows if not math.isnan(r.snr)), key=lambda r: (-snr_per_second(r), r.milliseconds)
        )

    def __str__(self) -> str:
        """Name the sites, and show the best estimators."""
        lines = ["Discrete sites of the guide:", *(f"- {_describe(site)}" for site in self.sites.discrete), ""]
        for unbiased, title in (
            (True, "unbiased"),
            (False, "biased: the cosine says how far off its direction is"),
        ):
            rows = self.ranked(unbiased=unbiased)[:BEST]
            if rows:
                lines += [f"Best for the parameters of the {self.group}, {title}:", "", _table(rows), ""]
        reasons = dict.fromkeys(self.left_out.values())
        lines += [f"{len(self.left_out)} estimators do not run on these programs:"]
        for reason in reasons:
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"- {', '.join(names)}: {reason}")
        return "\n".join(lines)


def suggest(
    model: PyroProgram,
    guide: PyroProgram,
    *args: Any,
    evaluations: int = 4,
    draws: int = 50,
    site: str | None = None,
    batch_plates: Sequence[str] = ("data",),
    estimators: Sequence[str] = (),
    seed: int = 0,
    show_progress: bool = False,
) -> Suggestion:
    """Measure which estimators suit two programs: `print(suggest(model, guide, x))`.

    All that run are compared at the parameters that the programs have now, with the same number of runs of the
    model. A gradient's signal-to-noise ratio grows with the root of the time that is spent on it, so estimators
    of different cost are ranked by that in one second, of the gradient of the discrete guide. Early and late in
    training the order may differ.

    Args:
        model, guide: any Pyro programs.
        args: their arguments, the data.
        evaluations: runs of the model per datapoint and gradient; what needs more takes its least.
        draws: gradients of each.
        site: the discrete site of which some estimators choose values; default: the first with finite support.
        batch_plates: plates whose elements are the datapoints.
        estimators: names; default: all.
        seed: the seed of all draws.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: a guide without discrete sites, or without parameters in their probabilities; unknown names; no
            estimator that runs, with the reasons.
    """
    if isinstance(estimators, str):
        raise ValueError(f"estimators: expected a sequence of names, got {estimators!r}")
    for name in estimators:
        if name not in ESTIMATORS:
            raise ValueError(f"estimators: expected names among {', '.join(ESTIMATORS)}, got {name!r}")
    programs = Programs(model, guide, args)
    with torch.random.fork_rng():
        sites = find_sites(programs, batch_plates)
        if not sites.discrete:
            raise ValueError("guide: expected a discrete site, found none; without one all gradients are pathwise")
        found, left_out = applicable(
            programs, evaluations, site=site, batch_plates=batch_plates, names=estimators or tuple(ESTIMATORS)
        )
        options: dict[str, Any] = {"draws": draws, "seed": seed, "show_progress": show_progress}
        comparison = compare(model, guide, args, estimators=found, batch_plates=batch_plates, **options)
    groups = {row.group for row in comparison.rows}
    group = next((name for name in GROUPS if name in groups), None)
    if group is None:
        raise ValueError(
            f"guide: expected parameters in the probabilities of its discrete sites, found {sorted(groups)}"
        )
    return Suggestion(sites, comparison, group, left_out)


def applicable(
    programs: Programs,
    evaluations: int,
    *,
    site: str | None = None,
    batch_plates: Sequence[str] = ("data",),
    names: Sequence[str] = tuple(ESTIMATORS),
) -> tuple[dict[str, ELBO], dict[str, str]]:
    """Make the estimators that run on two programs, with a matched budget.

    Args:
        programs: with their arguments.
        evaluations: the budget; see `matched`.
        site: the discrete site of which some choose values; default: the first with finite support.
        batch_plates: plates whose elements are the datapoints.
        names: of the estimators to try.

    Returns:
        The objectives by name, and why the others do not run.

    Raises:
        ValueError: none that runs.
    """
    nesting = PlateNesting()(programs)
    discrete = find_sites(programs, batch_plates).discrete
    finite = [s.name for s in discrete if s.size is not None]
    every = [s.name for s in discrete]
    chosen = site or (finite or every or [""])[0]
    model, guide, args, kwargs = programs.model, programs.guide, programs.args, dict(programs.kwargs)
    found: dict[str, ELBO] = {}
    left_out: dict[str, str] = {}
    for name in names:
        of: str | Sequence[str] = chosen
        if name == "exact" and len(finite) > 1 and math.prod(s.size or 1 for s in discrete) <= MOST_JOINT_VALUES:
            of = tuple(finite)
        elif name in SOFT and site is None and every:
            of = tuple(every)  # bits and vectors as well

        def build(name: str, k: int, of: str | Sequence[str] = of) -> Any:
            return make(name, k, site=of, max_plate_nesting=nesting, batch_plates=batch_plates)

        try:
            # Whatever a program does not support shows in one draw.
            evaluations_of(copy.deepcopy(build(name, max(2, evaluations))), model, guide, args, kwargs)
            found |= matched([name], build, evaluations, model, guide, args, kwargs)
        except Exception as error:  # whatever programs may raise where values are read otherwise
            told = first_line(error)
            left_out[name] = told if isinstance(error, PROGRAM_ERRORS) else f"{type(error).__name__}: {told}"
    if not found:
        raise ValueError(f"estimators: expected one that fits the program, none does: {left_out}")
    return found, left_out


def snr_per_second(row: Row) -> float:
    """Compute the signal-to-noise ratio of the mean of as many gradients as one second gives."""
    if row.snr > NO_NOISE:
        return math.inf
    return row.snr * math.sqrt(1000 / row.milliseconds)


def _describe(site: DiscreteSite) -> str:
    values = f"{site.size} values for each datapoint" if site.size is not None else f"{site.why_not}"
    return f"'{site.name}': {values}"


def _table(rows: Sequence[Row]) -> str:
    columns = [
        "estimator",
        "objective",
        "K",
        "model runs",
        "ms",
        "SNR",
        "SNR in one second",
        "bias, max abs z",
        "cosine",
    ]
    return table(
        columns,
        [
            [
                row.estimator,
                row.objective,
                str(row.num_particles),
                f"{row.evaluations:.3g}",
                f"{row.milliseconds:.1f}",
                "no noise" if row.snr > NO_NOISE else f"{row.snr:.3g}",
                "no noise" if row.snr > NO_NOISE else f"{snr_per_second(row):.3g}",
                f"{row.bias_z:.1f}",
                f"{row.cosine:.3f}",
            ]
            for row in rows
        ],
    )
