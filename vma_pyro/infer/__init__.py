"""Multi-sample objectives and gradient estimators for any Pyro program; nothing here knows our model.

Shape letters: K particles, B datapoints (elements of the batch plates), S values of an enumerated site.
"""

from vma_pyro.infer.baselines import (
    OVIS,
    OVISMonteCarlo,
    leave_one_out_logsumexp,
    loo,
    reinforce,
    score_baseline,
    vimco,
    vimco_geometric,
)
from vma_pyro.infer.chosen_site import DistinctELBO, ExactELBO, SumAndSampleELBO, UnorderedSetELBO
from vma_pyro.infer.compare import Comparison, Row, compare, fit_slope, matched
from vma_pyro.infer.critic import CriticELBO
from vma_pyro.infer.estimator import Estimate, Estimator
from vma_pyro.infer.groups import parameter_groups
from vma_pyro.infer.handlers import CommonNoise
from vma_pyro.infer.learned_baseline import NVIL, LearnedBaseline
from vma_pyro.infer.log_weights import Particles, draw_particles, log_weights, log_weights_given
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.pathwise import PathwiseRule, dreg, iwae, stl
from vma_pyro.infer.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.reference import EnumeratedReference
from vma_pyro.infer.registry import ESTIMATORS, make
from vma_pyro.infer.relaxed import RelaxedELBO
from vma_pyro.infer.rloo import RLOO
from vma_pyro.infer.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.wake_sleep import WakeWake

__all__ = [
    "ESTIMATORS",
    "NVIL",
    "OVIS",
    "RLOO",
    "CommonNoise",
    "Comparison",
    "CriticELBO",
    "DistinctELBO",
    "EnumeratedELBO",
    "EnumeratedReference",
    "Estimate",
    "Estimator",
    "ExactELBO",
    "GraphELBO",
    "LearnedBaseline",
    "MultiSampleELBO",
    "OVISMonteCarlo",
    "Particles",
    "PathwiseRule",
    "RelaxedELBO",
    "Row",
    "SumAndSampleELBO",
    "ThermodynamicELBO",
    "UnorderedSetELBO",
    "WakeWake",
    "compare",
    "draw_particles",
    "dreg",
    "fit_slope",
    "iwae",
    "leave_one_out_logsumexp",
    "log_weights",
    "log_weights_given",
    "loo",
    "make",
    "matched",
    "parameter_groups",
    "reinforce",
    "score_baseline",
    "stl",
    "vimco",
    "vimco_geometric",
]
