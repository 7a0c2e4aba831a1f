"""The estimator laboratory: which gradient estimator trains a memory model best, and why.

`setting` says what is compared, `runs` trains, `gradients` measures, `page` says what the figures mean.
"""

from vma_pyro.jobs.kept import check_same
from vma_pyro.laboratory.gradients import measure_all
from vma_pyro.laboratory.page import Findings, snr_of, to_markdown
from vma_pyro.laboratory.records import Quality, Training
from vma_pyro.laboratory.runs import candidate_of, train_all, train_finalists
from vma_pyro.laboratory.setting import LaboratoryConfig, load, plan_of

__all__ = [
    "Findings",
    "LaboratoryConfig",
    "Quality",
    "Training",
    "candidate_of",
    "check_same",
    "load",
    "measure_all",
    "plan_of",
    "snr_of",
    "to_markdown",
    "train_all",
    "train_finalists",
]
