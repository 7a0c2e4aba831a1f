"""Objectives and gradient estimators for any Pyro program with discrete and continuous latents.

Nothing here knows our model. Shape letters: K particles, B datapoints (elements of the batch plates), S values of
a discrete site. `ESTIMATORS` lists all by name; `compare` measures them on a program:

>>> import pyro, torch
>>> import pyro.distributions as dist
>>> pyro.clear_param_store()
>>> x = torch.tensor([-1.0, 0.2, 1.5])
>>> def model():
...     with pyro.plate("data", 3):
...         a = pyro.sample("a", dist.Categorical(logits=torch.zeros(4)))
...         pyro.sample("x", dist.Normal(pyro.param("means", torch.arange(4.0))[a], 1.0), obs=x)
>>> def guide():
...     with pyro.plate("data", 3):
...         pyro.sample("a", dist.Categorical(logits=pyro.param("logits", torch.zeros(3, 4))))

A new estimator is one pure function, from the log weights [K, B] to a baseline [K, B] that for each k ignores
particle k. This one is the mean of the others:

>>> @score_baseline(min_particles=2)
... def mean_of_the_others(log_weights):
...     return (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)

It is refused with too few particles, it works with every option of `MultiSampleELBO`, and it goes into the table
beside the others. The reference gradient sums all outcomes, so the bias of zero is a test:

>>> estimators = {
...     "vimco": MultiSampleELBO(4, baseline=vimco, max_plate_nesting=1),
...     "mean of the others": MultiSampleELBO(4, baseline=mean_of_the_others, max_plate_nesting=1),
... }
>>> table = compare(model, guide, estimators=estimators, draws=500, show_progress=False)
>>> row = table.of("mean of the others", "discrete guide")
>>> row.reference, row.evaluations, row.bias_z < 4.5
('exact, by enumeration', 4.0, True)
>>> print(table.to_markdown().splitlines()[0])
### discrete guide
>>> MultiSampleELBO(1, baseline=mean_of_the_others)
Traceback (most recent call last):
ValueError: num_particles: expected at least 2 for baseline 'mean_of_the_others', got 1
"""

from vma_pyro.infer.comparison.compare import compare, evaluations_of, matched
from vma_pyro.infer.comparison.reference import EnumeratedReference
from vma_pyro.infer.comparison.subject import parameter_groups
from vma_pyro.infer.comparison.suggest import Suggestion, suggest
from vma_pyro.infer.comparison.table import Comparison, Row, fit_slope
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.handlers import CommonNoise
from vma_pyro.infer.engine.log_weights import draw_particles, log_weights, log_weights_given
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.pathwise import PathwiseRule, dreg, iwae, stl
from vma_pyro.infer.estimators.arm import ARM
from vma_pyro.infer.estimators.arms import ARMS
from vma_pyro.infer.estimators.baselines import (
    OVIS,
    OVISMonteCarlo,
    leave_one_out_logsumexp,
    loo,
    reinforce,
    score_baseline,
    vimco,
    vimco_geometric,
)
from vma_pyro.infer.estimators.carms import CARMS
from vma_pyro.infer.estimators.critic import CriticELBO
from vma_pyro.infer.estimators.disarm import DisARM
from vma_pyro.infer.estimators.distinct import DistinctELBO
from vma_pyro.infer.estimators.double_cv import DoubleCV
from vma_pyro.infer.estimators.exact import ExactELBO
from vma_pyro.infer.estimators.jsa import JSA
from vma_pyro.infer.estimators.learned_baseline import NVIL, LearnedBaseline
from vma_pyro.infer.estimators.local import LocalARMS, LocalDisARM
from vma_pyro.infer.estimators.measure_valued import MeasureValued
from vma_pyro.infer.estimators.multi_sample import MultiSampleELBO
from vma_pyro.infer.estimators.priority import PriorityELBO
from vma_pyro.infer.estimators.pyro_elbos import EnumeratedELBO, GraphELBO
from vma_pyro.infer.estimators.rebar import REBAR
from vma_pyro.infer.estimators.registry import BINARY, ESTIMATORS, make
from vma_pyro.infer.estimators.relax import RELAX, RelaxationCritic
from vma_pyro.infer.estimators.relaxed import RelaxedELBO, gumbel_softmax
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
from vma_pyro.infer.estimators.sum_and_sample import SumAndSampleELBO
from vma_pyro.infer.estimators.thermodynamic import ThermodynamicELBO
from vma_pyro.infer.estimators.tree import DisARMTree
from vma_pyro.infer.estimators.unordered_set import UnorderedSetELBO
from vma_pyro.infer.estimators.wake_sleep import WakeWake

__all__ = [
    "ARM",
    "ARMS",
    "BINARY",
    "CARMS",
    "ESTIMATORS",
    "JSA",
    "NVIL",
    "OVIS",
    "REBAR",
    "RELAX",
    "RLOO",
    "RODEO",
    "CommonNoise",
    "Comparison",
    "CriticELBO",
    "DisARM",
    "DisARMStickBreaking",
    "DisARMTree",
    "DistinctELBO",
    "DoubleCV",
    "EnumeratedELBO",
    "EnumeratedReference",
    "Estimate",
    "Estimator",
    "ExactELBO",
    "GappedStraightThrough",
    "GraphELBO",
    "GumbelRao",
    "LearnedBaseline",
    "LocalARMS",
    "LocalDisARM",
    "MeasureValued",
    "MultiSampleELBO",
    "OVISMonteCarlo",
    "Particles",
    "PathwiseRule",
    "PriorityELBO",
    "RelaxationCritic",
    "RelaxedELBO",
    "ResampledELBO",
    "Row",
    "Suggestion",
    "SumAndSampleELBO",
    "ThermodynamicELBO",
    "UnorderedSetELBO",
    "WakeWake",
    "compare",
    "draw_particles",
    "dreg",
    "evaluations_of",
    "fit_slope",
    "gumbel_softmax",
    "gumbel_straight_through",
    "iwae",
    "leave_one_out_logsumexp",
    "log_weights",
    "log_weights_given",
    "loo",
    "make",
    "matched",
    "parameter_groups",
    "reinforce",
    "reinmax",
    "score_baseline",
    "stl",
    "straight_through",
    "suggest",
    "vimco",
    "vimco_geometric",
]
