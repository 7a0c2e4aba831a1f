"""Trained models, and their files: a checkpoint says which classes its programs are of, and they are made again.

Weights are numbers for one program. A file holds them with what makes the program again (`description`), and with
what it gave on an example (`provenance`), so that no others take them.
"""

from vma_pyro.models.allowed import classes_in
from vma_pyro.models.description import describe, rebuild
from vma_pyro.models.files import (
    CAUSAL,
    PRETRAINED,
    as_one,
    facts_of,
    load,
    on,
    read_weights,
    rounded,
    save,
    updates_of,
)
from vma_pyro.models.programs import (
    CONTEXT,
    LIKELIHOODS,
    PROGRAMS,
    Pair,
    build,
    likelihood_of,
    make_likelihood,
    program_of,
)

__all__ = [
    "CAUSAL",
    "CONTEXT",
    "LIKELIHOODS",
    "PRETRAINED",
    "PROGRAMS",
    "Pair",
    "as_one",
    "build",
    "classes_in",
    "describe",
    "facts_of",
    "likelihood_of",
    "load",
    "make_likelihood",
    "on",
    "program_of",
    "read_weights",
    "rebuild",
    "rounded",
    "save",
    "updates_of",
]
