"""Every estimator under its name, for tables, tests and command lines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyro.infer.elbo import ELBO

from vma_pyro.infer.engine.pathwise import dreg, stl
from vma_pyro.infer.estimators.baselines import OVIS, OVISMonteCarlo, loo, reinforce, vimco_geometric
from vma_pyro.infer.estimators.distinct import DistinctELBO
from vma_pyro.infer.estimators.exact import ExactELBO
from vma_pyro.infer.estimators.learned_baseline import NVIL
from vma_pyro.infer.estimators.multi_sample import MultiSampleELBO
from vma_pyro.infer.estimators.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.estimators.relaxed import RelaxedELBO
from vma_pyro.infer.estimators.resampled import ResampledELBO
from vma_pyro.infer.estimators.rloo import RLOO
from vma_pyro.infer.estimators.sum_and_sample import SumAndSampleELBO
from vma_pyro.infer.estimators.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.estimators.unordered_set import UnorderedSetELBO
from vma_pyro.infer.estimators.wake_sleep import WakeWake

Build = Callable[..., ELBO]


def _pyros(options: dict[str, Any]) -> dict[str, Any]:
    nesting = options["max_plate_nesting"]
    return {} if nesting is None else {"max_plate_nesting": nesting}


_ENTRIES: dict[str, Build] = {
    # The multi-sample bound: score baselines, pathwise rules, coupled particles.
    "reinforce": lambda k, site, **o: MultiSampleELBO(k, baseline=reinforce, **o),
    "nvil": lambda k, site, **o: MultiSampleELBO(k, baseline=NVIL(), **o),
    "vimco": lambda k, site, **o: MultiSampleELBO(k, **o),
    "vimco-geometric": lambda k, site, **o: MultiSampleELBO(k, baseline=vimco_geometric, **o),
    "loo": lambda k, site, **o: MultiSampleELBO(k, baseline=loo, **o),
    "ovis": lambda k, site, **o: MultiSampleELBO(k, baseline=OVIS(gamma=1.0), **o),
    "ovis-mc": lambda k, site, **o: MultiSampleELBO(k, baseline=OVISMonteCarlo(1), **o),
    "vimco+dreg": lambda k, site, **o: MultiSampleELBO(k, pathwise=dreg, **o),
    "loo+dreg": lambda k, site, **o: MultiSampleELBO(k, baseline=loo, pathwise=dreg, **o),
    "vimco+stl": lambda k, site, **o: MultiSampleELBO(k, pathwise=stl, **o),
    "vimco+common": lambda k, site, **o: MultiSampleELBO(k, noise="common", **o),
    "vimco+2z": lambda k, site, **o: MultiSampleELBO(k, draws_per_score=2, **o),
    "vimco+chunks": lambda k, site, **o: MultiSampleELBO(k, chunk_size=2, **o),
    "vimco+resampled": lambda k, site, **o: ResampledELBO(k, **o),
    "vimco+dreg+resampled": lambda k, site, **o: ResampledELBO(k, pathwise=dreg, **o),
    # Chosen values of one discrete site.
    "exact": lambda k, site, **o: ExactELBO(1, site=site, **o),
    "distinct": lambda k, site, **o: DistinctELBO(k, site=site, **o),
    "distinct+wake": lambda k, site, **o: DistinctELBO(k, site=site, guide_follows="posterior", **o),
    # The single-sample bound.
    "rloo": lambda k, site, **o: RLOO(k, **o),
    "unordered-set": lambda k, site, **o: UnorderedSetELBO(k, site=site, **o),
    "sum-and-sample": lambda k, site, **o: SumAndSampleELBO(k, site=site, **o),
    "pyro-graph": lambda k, site, **o: GraphELBO(num_particles=k, vectorize_particles=True, **_pyros(o)),
    "pyro-enum": lambda k, site, **o: EnumeratedELBO(**_pyros(o)),
    # Other objectives.
    "wake-wake": lambda k, site, **o: WakeWake(k, **o),
    "wake-wake-uncentred": lambda k, site, **o: WakeWake(k, centred=False, **o),
    "wake-wake-defensive": lambda k, site, **o: WakeWake(k, defensive=0.1, **o),
    "wake-sleep": lambda k, site, **o: WakeWake(k, insomnia=0.0, **o),
    "tvo": lambda k, site, **o: ThermodynamicELBO(k, **o),
    "gumbel-softmax": lambda k, site, **o: RelaxedELBO(k, site=site, **o),
    "straight-through": lambda k, site, **o: RelaxedELBO(k, site=site, straight_through=True, **o),
}


def _build(
    entry: Build, k: int, site: str | Sequence[str], nesting: int | None, plates: Sequence[str] = ("data",)
) -> ELBO:
    return entry(k, site, max_plate_nesting=nesting, batch_plates=plates)


# From K, the site whose values some of them choose, `max_plate_nesting` and `batch_plates` to a new objective.
ESTIMATORS: dict[str, Build] = {name: functools.partial(_build, entry) for name, entry in _ENTRIES.items()}


def make(
    name: str,
    num_particles: int,
    *,
    site: str | Sequence[str] = "address",
    max_plate_nesting: int | None = 1,
    batch_plates: Sequence[str] = ("data",),
) -> Any:
    """A new objective of `ESTIMATORS`.

    Args:
        name: its name.
        num_particles: K, or the number of chosen values; "exact" and "pyro-enum" take all values once, whatever K.
        site: the discrete site whose values some estimators choose; "exact" takes several.
        max_plate_nesting: number of plate dimensions of the programs; None runs them once more to find out.
        batch_plates: plates whose elements are the datapoints; with none, `()`, the whole data set is one. Pyro's
            own sum over all of it and do not ask.

    Raises:
        ValueError: an unknown name; too few particles for it.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name](num_particles, site, max_plate_nesting, batch_plates)
