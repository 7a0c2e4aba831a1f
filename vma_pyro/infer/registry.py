"""Every estimator under its name, for tables, tests and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.elbo import ELBO

from vma_pyro.infer.baselines import OVIS, OVISMonteCarlo, loo, reinforce, vimco_geometric
from vma_pyro.infer.chosen_site import DistinctELBO, ExactELBO, SumAndSampleELBO, UnorderedSetELBO
from vma_pyro.infer.learned_baseline import NVIL
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.pathwise import dreg, stl
from vma_pyro.infer.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.relaxed import RelaxedELBO
from vma_pyro.infer.resampled import ResampledELBO
from vma_pyro.infer.rloo import RLOO
from vma_pyro.infer.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.wake_sleep import WakeWake

Build = Callable[..., ELBO]

# From K, the site whose values some of them choose, and `max_plate_nesting` to a new objective.
ESTIMATORS: dict[str, Build] = {
    # The multi-sample bound: score baselines, pathwise rules, coupled particles.
    "reinforce": lambda k, site, n: MultiSampleELBO(k, baseline=reinforce, max_plate_nesting=n),
    "nvil": lambda k, site, n: MultiSampleELBO(k, baseline=NVIL(), max_plate_nesting=n),
    "vimco": lambda k, site, n: MultiSampleELBO(k, max_plate_nesting=n),
    "vimco-geometric": lambda k, site, n: MultiSampleELBO(k, baseline=vimco_geometric, max_plate_nesting=n),
    "loo": lambda k, site, n: MultiSampleELBO(k, baseline=loo, max_plate_nesting=n),
    "ovis": lambda k, site, n: MultiSampleELBO(k, baseline=OVIS(gamma=1.0), max_plate_nesting=n),
    "ovis-mc": lambda k, site, n: MultiSampleELBO(k, baseline=OVISMonteCarlo(1), max_plate_nesting=n),
    "vimco+dreg": lambda k, site, n: MultiSampleELBO(k, pathwise=dreg, max_plate_nesting=n),
    "loo+dreg": lambda k, site, n: MultiSampleELBO(k, baseline=loo, pathwise=dreg, max_plate_nesting=n),
    "vimco+stl": lambda k, site, n: MultiSampleELBO(k, pathwise=stl, max_plate_nesting=n),
    "vimco+common": lambda k, site, n: MultiSampleELBO(k, noise="common", max_plate_nesting=n),
    "vimco+2z": lambda k, site, n: MultiSampleELBO(k, draws_per_score=2, max_plate_nesting=n),
    "vimco+chunks": lambda k, site, n: MultiSampleELBO(k, chunk_size=2, max_plate_nesting=n),
    "vimco+resampled": lambda k, site, n: ResampledELBO(k, max_plate_nesting=n),
    "vimco+dreg+resampled": lambda k, site, n: ResampledELBO(k, pathwise=dreg, max_plate_nesting=n),
    # Chosen values of one discrete site.
    "exact": lambda k, site, n: ExactELBO(1, site=site, max_plate_nesting=n),
    "distinct": lambda k, site, n: DistinctELBO(k, site=site, max_plate_nesting=n),
    "distinct+wake": lambda k, site, n: DistinctELBO(k, site=site, guide_follows="posterior", max_plate_nesting=n),
    # The single-sample bound.
    "rloo": lambda k, site, n: RLOO(k, max_plate_nesting=n),
    "unordered-set": lambda k, site, n: UnorderedSetELBO(k, site=site, max_plate_nesting=n),
    "sum-and-sample": lambda k, site, n: SumAndSampleELBO(k, site=site, max_plate_nesting=n),
    "pyro-graph": lambda k, site, n: GraphELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=n),
    "pyro-enum": lambda k, site, n: EnumeratedELBO(max_plate_nesting=n),
    # Other objectives.
    "wake-wake": lambda k, site, n: WakeWake(k, max_plate_nesting=n),
    "wake-wake-uncentred": lambda k, site, n: WakeWake(k, centred=False, max_plate_nesting=n),
    "wake-wake-defensive": lambda k, site, n: WakeWake(k, defensive=0.1, max_plate_nesting=n),
    "wake-sleep": lambda k, site, n: WakeWake(k, insomnia=0.0, max_plate_nesting=n),
    "tvo": lambda k, site, n: ThermodynamicELBO(k, max_plate_nesting=n),
    "gumbel-softmax": lambda k, site, n: RelaxedELBO(k, site=site, max_plate_nesting=n),
    "straight-through": lambda k, site, n: RelaxedELBO(k, site=site, straight_through=True, max_plate_nesting=n),
}


def make(name: str, num_particles: int, *, site: str = "address", max_plate_nesting: int = 1) -> Any:
    """A new objective of `ESTIMATORS`.

    Args:
        name: its name.
        num_particles: K, or the number of chosen values; "exact" and "pyro-enum" take all values once, whatever K.
        site: the discrete site whose values some estimators choose.
        max_plate_nesting: number of plate dimensions of the programs.

    Raises:
        ValueError: an unknown name; too few particles for it.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name](num_particles, site, max_plate_nesting)
