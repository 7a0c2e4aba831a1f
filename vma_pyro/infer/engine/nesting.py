"""How many plate dimensions two programs have."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from vma_pyro.infer.engine.plates import drawn_by, sample_sites
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import run


class PlateNesting:
    """Guesses the number of plate dimensions by one run of model and guide, which leaves no trace behind.

    The guess is kept per pair of programs, not per objective: one objective may serve several programs.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], int]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy knows nothing yet: weak references cannot be copied."""
        return PlateNesting, ()

    def __call__(self, programs: Programs) -> int:
        """The largest plate dimension, counted from the right, over the sites of both programs."""
        model, guide = programs.model, programs.guide
        try:
            guide_ref, nesting = self._known[model]
            if guide_ref() is guide:
                return nesting
        except (KeyError, TypeError):
            pass
        programs = programs.prepared()
        args, kwargs = programs.args, programs.kwargs
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            guide_trace = run(guide, args, kwargs)
            model_trace = run(poutine.replay(model, trace=drawn_by(guide_trace)), args, kwargs)
        frames = (
            frame
            for trace in (model_trace, guide_trace)
            for site in sample_sites(prune_subsample_sites(trace))
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        )
        nesting = max((-frame.dim for frame in frames), default=0)
        with suppress(TypeError):  # a callable without weak references is guessed anew each time
            self._known[model] = (weakref.ref(guide), nesting)
        return nesting
