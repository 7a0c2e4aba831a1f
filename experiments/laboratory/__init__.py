"""The estimator laboratory: which gradient estimator trains a memory model best, and why.

`setting` says what is compared, `runs` trains, `gradients` measures, `page` says what the figures mean.
"""

from common.kept import check_same
from laboratory.gradients import measure_all
from laboratory.page import Findings, snr_of, to_markdown
from laboratory.records import Quality, Training
from laboratory.runs import candidate_of, train_all, train_finalists
from laboratory.setting import LaboratoryConfig

__all__ = [
    "Findings",
    "LaboratoryConfig",
    "Quality",
    "Training",
    "candidate_of",
    "check_same",
    "measure_all",
    "snr_of",
    "to_markdown",
    "train_all",
    "train_finalists",
]
