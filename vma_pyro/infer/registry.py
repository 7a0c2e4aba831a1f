"""Every estimator under its name, for tables, tests and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.elbo import ELBO

from vma_pyro.infer.baselines import OVIS, OVISMonteCarlo, loo, reinforce, vimco, vimco_geometric
from vma_pyro.infer.chosen_site import DistinctELBO, ExactELBO, SumAndSampleELBO, UnorderedSetELBO
from vma_pyro.infer.learned_baseline import NVIL
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.pathwise import dreg, stl
from vma_pyro.infer.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.relaxed import RelaxedELBO
from vma_pyro.infer.rloo import RLOO
from vma_pyro.infer.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.wake_sleep import WakeWake

Factory = Callable[..., ELBO]


def _multi(**fixed: Any) -> Factory:
    def build(num_particles: int, *, site: str = "address", **plates: Any) -> ELBO:
        return MultiSampleELBO(num_particles, **fixed, **plates)

    return build


def _sampled(kind: Callable[..., ELBO], **fixed: Any) -> Factory:
    def build(num_particles: int, *, site: str = "address", **plates: Any) -> ELBO:
        return kind(num_particles, **fixed, **plates)

    return build


def _at_site(kind: Callable[..., ELBO], **fixed: Any) -> Factory:
    def build(num_particles: int, *, site: str = "address", **plates: Any) -> ELBO:
        return kind(num_particles, site=site, **fixed, **plates)

    return build


ESTIMATORS: dict[str, Factory] = {
    # the multi-sample bound
    "reinforce": _multi(baseline=reinforce),
    "vimco": _multi(),
    "vimco-geometric": _multi(baseline=vimco_geometric),
    "loo": _multi(baseline=loo),
}
