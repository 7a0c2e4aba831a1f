"""Compare gradient estimators on any Pyro program: bias, variance, signal-to-noise, cost."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from tqdm import tqdm

from vma_pyro.infer.comparison.evaluations import count_evaluations
from vma_pyro.infer.comparison.measurement import Measurement
from vma_pyro.infer.comparison.subject import Groups, Subject
from vma_pyro.infer.comparison.table import Comparison, Row
from vma_pyro.infer.engine.plates import PyroProgram
from vma_pyro.infer.engine.programs import Programs


def compare(
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    estimators: Mapping[str, ELBO],
    draws: int = 200,
    reference: str | ELBO | None = None,
    reference_draws: int | None = None,
    groups: Groups | None = None,
    batch_plates: Sequence[str] = ("data",),
    warm_up: int = 100,
    seed: int = 0,
    show_progress: bool = True,
) -> Comparison:
    """Draw each estimator's gradient many times on the same data, and compare it with a reference.

    The reference is the gradient of the estimator's own objective, found by something else than the estimator.
    By default it is the best that the programs allow; each row says which, and how well it is known:

    1. the discrete sites enumerated, all values at once in dimensions of their own, as `EnumeratedReference` does
       for every objective that is a finite sum over them (exact for a program without continuous sites);
    2. the same with one run of the programs for each joint value, for a program that cannot take such dimensions
       (`torch.cat([z, one_hot(a)], -1)`);
    3. a long run of `loo` or `RLOO` for the K-sample bound and the single-sample one;
    4. a longer run of the estimator itself, which can only tell whether it repeats itself.

    A biased estimator of another objective is compared with the K-sample bound: its z-score tells how far it is.

    Args:
        model, guide: any Pyro programs: modules, or functions with `pyro.param`.
        args, kwargs: their arguments, the data.
        estimators: objectives by name; see `make` and `matched`.
        draws: number of gradients of each.
        reference: None (the best), "enumeration" (1 or 2), "long run" (3 or 4), or an objective that judges all.
        reference_draws: number of gradients of the reference; 4 times `draws` by default.
        groups: parameters by name of group; `parameter_groups` by default.
        batch_plates: plates whose elements are the datapoints, those of the estimators.
        warm_up: draws on which learned baselines are trained first.
        seed: the seed of all draws.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: fewer than 2 draws, no estimators, no parameters; estimators with other batch plates; a
            reference that was named and cannot be had; and what the estimators refuse.
    """
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, got {draws}")
    if not estimators:
        raise ValueError("estimators: expected at least one, got none")
    for name, elbo in estimators.items():
        own = getattr(elbo, "batch_plates", tuple(batch_plates))
        if tuple(own) != tuple(batch_plates):
            raise ValueError(
                f"batch_plates: expected {list(own)}, as estimator {name!r} has, got {list(batch_plates)}"
            )
    subject = Subject(Programs(model, guide, args, kwargs or {}), batch_plates, groups)
    measurement = Measurement(subject, draws, reference_draws or 4 * draws, seed, reference)
    rows: list[Row] = []
    with torch.random.fork_rng(), tqdm(estimators.items(), disable=not show_progress, unit="estimator") as bar:
        for name, elbo in bar:
            bar.set_description(name)
            rows += measurement.measure(name, elbo, warm_up)
    return Comparison(tuple(rows), seed)


def matched(
    names: Sequence[str],
    make: Callable[[str, int], ELBO],
    evaluations: int,
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> dict[str, ELBO]:
    """Make estimators with as many particles as cost at most so many runs of the model per datapoint.

    Args:
        names: names of estimators.
        make: from a name and K to an objective.
        evaluations: the budget. An estimator that needs more keeps its least K.
        model, guide, args, kwargs: as for `compare`.
    """
    programs = Programs(model, guide, args, kwargs or {})
    return {name: _largest(functools.partial(make, name), evaluations, programs) for name in names}


def _largest(make: Callable[[int], ELBO], evaluations: int, programs: Programs) -> ELBO:
    """Make the estimator with the most particles that the budget allows, or with the fewest that it accepts."""

    def priced(k: int) -> tuple[ELBO, float, int]:
        elbo = make(k)
        return elbo, count_evaluations(copy.deepcopy(elbo), programs), k  # a learned baseline learns from a draw

    found: ELBO | None = None
    cost, k = math.inf, evaluations + 1
    reason = ValueError(f"evaluations: expected at least 1, got {evaluations}")
    while cost > evaluations and k > 1:
        k -= 1
        try:
            found, cost, k = priced(k)
        except ValueError as error:  # more than the site has values, or less than the estimator needs
            reason = error
    if found is None:
        raise reason
    while 0 < cost < evaluations:  # a particle may cost less than a run of the model
        try:
            larger = priced(max(k + 1, int(k * evaluations / cost)))
        except ValueError:
            break
        if larger[1] > evaluations + 1e-9 or larger[1] == cost:  # it takes all values once, whatever K
            break
        found, cost, k = larger
    return found


def evaluations_of(
    elbo: ELBO,
    model: PyroProgram,
    guide: PyroProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> float:
    """Count the runs of the model per datapoint that one gradient takes."""
    return count_evaluations(elbo, Programs(model, guide, args, kwargs or {}))
