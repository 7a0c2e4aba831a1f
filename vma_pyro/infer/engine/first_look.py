"""A first look at two programs in a run without particles: their plates, and dimensions that no plate declares."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from vma_pyro._system.at_rest import at_rest, met_at_rest
from vma_pyro._system.compiling import not_compiled
from vma_pyro.infer.engine.checks import check_dimensions
from vma_pyro.infer.engine.plates import Layout, PyroProgram, Site, sample_sites
from vma_pyro.infer.engine.programs import Programs, unwrapped
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
        frames = (frame for trace in traces for site in sample_sites(trace) for frame in site["cond_indep_stack"])
        nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        with suppress(TypeError):  # without weak references they are run each time
            self._known[programs.model] = (weakref.ref(programs.guide), nesting)
        return nesting


class Known:
    """Which pairs of programs have been looked at, as long as they live, and what was noted of them."""

    def __init__(self) -> None:
        self._of_model: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def find(self, programs: Programs, *more: Any) -> tuple[dict[Any, Any], Any]:
        """Find the notes of a model, and the key of a pair; those without weak references are new each time."""
        owner, how = owner_of(programs.model)
        guide_owner, guide_how = owner_of(programs.guide)
        with suppress(TypeError):
            key = (how, weakref.ref(guide_owner), guide_how, *more)
            known = self._of_model.setdefault(owner, {})
            for gone in [other for other in known if other[1]() is None]:
                del known[gone]
            return known, key
        return {}, None

    def is_due(self, programs: Programs) -> bool:
        """Count the calls of a pair; what weights hide at first is looked for again after 10, 100, ... of them."""
        known, key = self.find(programs)
        calls = known[key] = known.get(key, 0) + 1
        return calls == 10 ** (len(str(calls)) - 1)


class FirstLook:
    """Refuses programs with undeclared dimensions, once for each pair of programs and shapes of their arguments.

    In a run of all particles such a dimension, if it has their size, would be averaged over like theirs, inside
    the logarithm. Data that programs hold themselves must keep their shape: they are not among the arguments.
    """

    def __init__(self) -> None:
        self._known = Known()

    @not_compiled
    def check(self, programs: Programs, nesting: int) -> None:
        """Run both once, leave no trace behind, and refuse a dimension that no plate declares."""
        if is_recorded():  # what is recorded is run as well, and looked at then
            return
        known, key = self._known.find(programs, nesting, _shapes(programs.as_given))
        if key in known:
            return
        guide_sites, model_sites = _sites(programs)
        if not any(_is_decided(site) for site in guide_sites):
            for site in (*guide_sites, *model_sites):
                check_dimensions(site, Layout((), nesting), 1, {})
        known[key] = True


look = FirstLook()


def is_recorded() -> bool:
    """Tell whether `make_fx` is writing operations down, noise included."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def owner_of(program: PyroProgram) -> tuple[Any, tuple[Any, ...]]:
    """Find what lives as long as a program, and what is around it: methods and handlers are new each time."""
    if isinstance(program, types.MethodType):
        return program.__self__, (program.__func__.__qualname__,)
    inner, handlers = unwrapped(program)
    around = tuple(part for handler in handlers for part in (type(handler).__name__, _shapes(vars(handler))))
    if inner is program:
        return program, around
    owner, how = owner_of(inner)
    return owner, (*around, *how)


def _is_decided(site: Site) -> bool:
    """Tell whether a handler has given a latent site of the guide values for several particles."""
    batch = site["value"].dim() - site["fn"].event_dim
    return not site["is_observed"] and batch > len(site["fn"].batch_shape)


def _shapes(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.shape
    if isinstance(tree, dict):
        return tuple((key, _shapes(value)) for key, value in tree.items())
    if isinstance(tree, tuple | list):
        return tuple(map(_shapes, tree))
    return tree if isinstance(tree, bool | int | str) else type(tree)


def _sites(programs: Programs) -> tuple[list[Site], list[Site]]:
    """Run guide and model, and return their sites; none if they fail, as the run of all particles says why."""
    try:
        with undisturbed(programs.model, programs.guide), poutine.block():
            traces = run_both(programs)
            for trace in traces:
                trace.compute_log_prob()
    except Exception:  # whatever programs may raise
        return [], []
    guide, model = (list(sample_sites(trace)) for trace in traces)
    return guide, model


@contextmanager
def undisturbed(*programs: PyroProgram) -> Iterator[None]:
    """Take no gradient, no number of the random stream, and no statistics that a training mode would gather."""
    with torch.random.fork_rng(), torch.no_grad(), at_rest(*programs), met_at_rest():
        yield
