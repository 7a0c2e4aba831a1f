"""Likelihoods, the split of the KL, and few-shot classification, each with its standard error.

Everything here runs without gradients, in evaluation mode, under its own random stream: nothing disturbs a
training run. Model and guide are any Pyro programs with the signature (memory, x) whose sites are in the plate
`data`. The site `address` has figures of its own, and a model without it (the memoryless one) has zero address
terms; all other sites, `z` and `x` too, are reported by name.
"""

from vma_pyro.evaluation.banks import encoded, encoded_bank
from vma_pyro.evaluation.classification import (
    address_posterior,
    classify,
    classify_by_attention,
    classify_by_likelihood,
    entry_log_likelihood,
)
from vma_pyro.evaluation.estimates import Mean, TwoPhase, distribution_at, undisturbed
from vma_pyro.evaluation.fidelity import Diversity, Fidelity, class_fidelity, sample_diversity
from vma_pyro.evaluation.gap import GuideGap, guide_gap
from vma_pyro.evaluation.kl import KLReport, kl_report, mutual_information
from vma_pyro.evaluation.large import large_log_likelihood, sample_images
from vma_pyro.evaluation.likelihood import log_likelihood
from vma_pyro.evaluation.split import BoundParts, split_bound
from vma_pyro.evaluation.together import MatchScores, assign, match_scores

__all__ = [
    "BoundParts",
    "Diversity",
    "Fidelity",
    "GuideGap",
    "KLReport",
    "MatchScores",
    "Mean",
    "TwoPhase",
    "address_posterior",
    "assign",
    "class_fidelity",
    "classify",
    "classify_by_attention",
    "classify_by_likelihood",
    "distribution_at",
    "encoded",
    "encoded_bank",
    "entry_log_likelihood",
    "guide_gap",
    "kl_report",
    "large_log_likelihood",
    "log_likelihood",
    "match_scores",
    "mutual_information",
    "sample_diversity",
    "sample_images",
    "split_bound",
    "undisturbed",
]
