"""Every estimator under its name, for tables, tests and command lines."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyro.infer.elbo import ELBO
from torch import nn

from vma_pyro.infer.engine.estimator import Estimator
from vma_pyro.infer.engine.pathwise import dreg, stl
from vma_pyro.infer.estimators.arm import ARM
from vma_pyro.infer.estimators.arms import ARMS
from vma_pyro.infer.estimators.baselines import OVIS, OVISMonteCarlo, loo, reinforce, vimco_geometric
from vma_pyro.infer.estimators.carms import CARMS
from vma_pyro.infer.estimators.disarm import DisARM
from vma_pyro.infer.estimators.distinct import DistinctELBO
from vma_pyro.infer.estimators.double_cv import DoubleCV
from vma_pyro.infer.estimators.exact import ExactELBO
from vma_pyro.infer.estimators.jsa import JSA
from vma_pyro.infer.estimators.learned_baseline import NVIL
from vma_pyro.infer.estimators.local import LocalARMS, LocalDisARM
from vma_pyro.infer.estimators.measure_valued import MeasureValued
from vma_pyro.infer.estimators.multi_sample import MultiSampleELBO
from vma_pyro.infer.estimators.priority import PriorityELBO
from vma_pyro.infer.estimators.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.estimators.rebar import REBAR
from vma_pyro.infer.estimators.relax import RELAX
from vma_pyro.infer.estimators.relaxed import RelaxedELBO
from vma_pyro.infer.estimators.relaxed_control import RelaxedControlELBO
from vma_pyro.infer.estimators.resampled import ResampledELBO
from vma_pyro.infer.estimators.rloo import RLOO
from vma_pyro.infer.estimators.rodeo import RODEO
from vma_pyro.infer.estimators.stick_breaking import DisARMStickBreaking
from vma_pyro.infer.estimators.straight_through import (
    GappedStraightThrough,
    GumbelRao,
    gumbel_straight_through,
    reinmax,
    straight_through,
)
from vma_pyro.infer.estimators.subset import SubsetELBO
from vma_pyro.infer.estimators.sum_and_sample import SumAndSampleELBO
from vma_pyro.infer.estimators.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.estimators.tree import DisARMTree
from vma_pyro.infer.estimators.unordered_set import UnorderedSetELBO
from vma_pyro.infer.estimators.wake_sleep import WakeWake

Build = Callable[..., ELBO]

_ENTRIES: dict[str, tuple[type[ELBO], dict[str, Any]]] = {
    # The K-sample bound: score baselines, pathwise rules, coupled particles.
    "reinforce": (MultiSampleELBO, {"baseline": reinforce}),
    "nvil": (MultiSampleELBO, {"baseline": NVIL()}),
    "vimco": (MultiSampleELBO, {}),
    "vimco-geometric": (MultiSampleELBO, {"baseline": vimco_geometric}),
    "loo": (MultiSampleELBO, {"baseline": loo}),
    "ovis": (MultiSampleELBO, {"baseline": OVIS(gamma=1.0)}),
    "ovis-mc": (MultiSampleELBO, {"baseline": OVISMonteCarlo(1)}),
    "vimco+dreg": (MultiSampleELBO, {"pathwise": dreg}),
    "loo+dreg": (MultiSampleELBO, {"baseline": loo, "pathwise": dreg}),
    "vimco+stl": (MultiSampleELBO, {"pathwise": stl}),
    "vimco+common": (MultiSampleELBO, {"noise": "common"}),
    "vimco+2z": (MultiSampleELBO, {"draws_per_score": 2}),
    "vimco+chunks": (MultiSampleELBO, {"chunk_size": 2}),
    "vimco+resampled": (ResampledELBO, {}),
    "vimco+dreg+resampled": (ResampledELBO, {"pathwise": dreg}),
    # Several values of a discrete site, or of all of them.
    "measure-valued": (MeasureValued, {}),
    "measure-valued+common": (MeasureValued, {"noise": "common"}),
    "exact": (ExactELBO, {"num_particles": 1}),
    "distinct": (DistinctELBO, {}),
    "distinct+wake": (DistinctELBO, {"guide_follows": "posterior"}),
    "priority": (PriorityELBO, {}),
    # The single-sample bound.
    "rloo": (RLOO, {}),
    "double-cv": (DoubleCV, {}),
    "double-cv+common": (DoubleCV, {"noise": "common"}),
    "rodeo": (RODEO, {}),
    "rebar": (REBAR, {}),
    "relax": (RELAX, {}),
    "unordered-set": (UnorderedSetELBO, {}),
    "sum-and-sample": (SumAndSampleELBO, {}),
    "pyro-graph": (GraphELBO, {"vectorize_particles": True}),
    "pyro-enum": (EnumeratedELBO, {"num_particles": 1}),
    # Coupled particles: binary values, and categorical ones.
    "arm": (ARM, {}),
    "disarm": (DisARM, {}),
    "arms": (ARMS, {}),
    "local-disarm": (LocalDisARM, {}),
    "local-arms": (LocalARMS, {}),
    "disarm-tree": (DisARMTree, {}),
    "disarm-tree+common": (DisARMTree, {"noise": "common"}),
    "disarm-stick": (DisARMStickBreaking, {}),
    "carms": (CARMS, {}),
    # Other objectives.
    "wake-wake": (WakeWake, {}),
    "wake-wake-uncentred": (WakeWake, {"centred": False}),
    "wake-wake-defensive": (WakeWake, {"defensive": 0.1}),
    "wake-sleep": (WakeWake, {"insomnia": 0.0}),
    "jsa": (JSA, {}),
    "tvo": (ThermodynamicELBO, {}),
    "gumbel-softmax": (RelaxedELBO, {}),
    "straight-through": (RelaxedELBO, {"relaxation": gumbel_straight_through}),
    "straight-through-plain": (RelaxedELBO, {"relaxation": straight_through, "temperature": 1.0}),
    "reinmax": (RelaxedELBO, {"relaxation": reinmax, "temperature": 1.0}),
    "gumbel-rao": (RelaxedELBO, {"relaxation": GumbelRao()}),
    "gapped-straight-through": (RelaxedELBO, {"relaxation": GappedStraightThrough(), "temperature": 1.0}),
}


def _build(
    name: str, k: int, site: str | Sequence[str], nesting: int | None, plates: Sequence[str] = ("data",)
) -> ELBO:
    kind, own = _ENTRIES[name]
    options: dict[str, Any] = {"num_particles": k, "max_plate_nesting": nesting, **own}
    if issubclass(kind, SubsetELBO | RelaxedELBO | RelaxedControlELBO | RODEO):
        options["site"] = site
    if issubclass(kind, Estimator):
        options["batch_plates"] = plates
    elif nesting is None:  # Pyro's own have another word for what is not known
        del options["max_plate_nesting"]
    # Every objective gets its own copy of a baseline that learns.
    return kind(**{key: copy.deepcopy(o) if isinstance(o, nn.Module) else o for key, o in options.items()})


# From K, the site whose values some of them take, `max_plate_nesting` and `batch_plates` to a new objective.
ESTIMATORS: dict[str, Build] = {name: functools.partial(_build, name) for name in _ENTRIES}

# Names of those for binary values alone, which refuse a categorical site such as an address.
BINARY = frozenset(name for name, (kind, _) in _ENTRIES.items() if getattr(kind, "values", "any") == "binary")

# Names of those that show programs weights in the place of values, or differentiate with respect to values; they
# take any number of sites.
SOFT = frozenset(
    name for name, (kind, _) in _ENTRIES.items() if issubclass(kind, RelaxedELBO | RelaxedControlELBO | RODEO)
)


def make(
    name: str,
    num_particles: int,
    *,
    site: str | Sequence[str] = "address",
    max_plate_nesting: int | None = 1,
    batch_plates: Sequence[str] = ("data",),
) -> Any:
    """Make a new objective of `ESTIMATORS`.

    Args:
        name: its name.
        num_particles: K, or the number of values; "exact" and "pyro-enum" take all values once, whatever K.
        site: the discrete site of which some estimators take several values; "exact" takes several.
        max_plate_nesting: number of plate dimensions of the programs; None runs them once more to find out.
        batch_plates: plates whose elements are the datapoints; with none, `()`, the whole data set is one. Pyro's
            own sum over all of it and do not ask.

    Raises:
        ValueError: an unknown name; too few particles for it.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name](num_particles, site, max_plate_nesting, batch_plates)
