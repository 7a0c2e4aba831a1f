"""The estimator laboratory: which gradient estimator trains a memory model best, and why.

`options` says what is compared, `runs` trains, `gradients` measures, `findings` holds the figures, and `page` and
`answers` say what they mean.
"""

from laboratory.findings import Findings, Quality, Training, address_snr
from laboratory.gradients import measure_all
from laboratory.options import LaboratoryConfig
from laboratory.page import to_markdown
from laboratory.runs import train_all, train_finalists

__all__ = [
    "Findings",
    "LaboratoryConfig",
    "Quality",
    "Training",
    "address_snr",
    "measure_all",
    "to_markdown",
    "train_all",
    "train_finalists",
]
