"""Multi-sample objectives and gradient estimators for any Pyro program; nothing here knows our model.

Shape letters: K particles, B datapoints (elements of the batch plates), S values of an enumerated site.
"""

from vma_pyro.infer.baselines import (
    leave_one_out_logsumexp,
    loo,
    reinforce,
    vimco,
    vimco_geometric,
)
from vma_pyro.infer.log_weights import Particles, draw_particles, log_weights, log_weights_given
from vma_pyro.infer.multi_sample import MultiSampleELBO

__all__ = [
    "MultiSampleELBO",
    "Particles",
    "draw_particles",
    "leave_one_out_logsumexp",
    "log_weights",
    "log_weights_given",
    "loo",
    "reinforce",
    "vimco",
    "vimco_geometric",
]
