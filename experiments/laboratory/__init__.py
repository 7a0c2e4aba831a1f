"""The estimator laboratory: which gradient estimator trains a memory model best, and why.

`setting` says what is compared, `runs` trains, `gradients` measures, `page` says what the figures mean.
"""

from common.kept import check_same
from laboratory.gradients import measure_all
from laboratory.page import Findings, snr_of, to_markdown
from laboratory.records import Quality, Training
from laboratory.runs import candidate_of, train_all, train_finalists
from laboratory.setting import LaboratoryConfig, load, plan_of

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
