"""The number of plate dimensions that two programs use."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from vma_pyro.infer.engine.plates import sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import run_both


class PlateNesting:
    """Counts plate dimensions in one run of model and guide, which leaves no trace behind.

    The number is kept for each pair of programs, as one objective may serve several.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], int]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy nothing that is known: weak references cannot be copied."""
        return PlateNesting, ()

    def __call__(self, programs: Programs) -> int:
        """Return the largest plate dimension, counted from the right, over the sites of both programs."""
        with suppress(KeyError, TypeError):
            guide, nesting = self._known[programs.model]
            if guide() is programs.guide:
                return nesting
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            traces = run_both(programs.prepared())
        sites = (site for trace in traces for site in sample_sites(prune_subsample_sites(trace)))
        frames = (frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized)
        nesting = max((-frame.dim for frame in frames), default=0)
        with suppress(TypeError):  # without weak references they are run each time
            self._known[programs.model] = (weakref.ref(programs.guide), nesting)
        return nesting
