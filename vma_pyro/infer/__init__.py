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
from vma_pyro.infer.estimator import Estimator
from vma_pyro.infer.learned_baseline import NVIL, LearnedBaseline
from vma_pyro.infer.log_weights import Particles, draw_particles, log_weights, log_weights_given
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.pathwise import PathwiseRule, dreg, iwae, stl

__all__ = [
    "NVIL",
    "OVIS",
    "Estimator",
    "LearnedBaseline",
    "MultiSampleELBO",
    "OVISMonteCarlo",
    "Particles",
    "PathwiseRule",
    "draw_particles",
    "dreg",
    "iwae",
    "leave_one_out_logsumexp",
    "log_weights",
    "log_weights_given",
    "loo",
    "reinforce",
    "score_baseline",
    "stl",
    "vimco",
    "vimco_geometric",
]
