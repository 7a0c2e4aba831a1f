"""The cost of an estimator, in runs of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.plates import PARTICLES
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.running import LOOKS


def count_evaluations(elbo: Any, programs: Programs) -> float:
    """Count runs of the model's observed sites per datapoint in one gradient, backward pass included."""
    counter = _Counter()
    counted = replace(programs, model=counter(programs.model))
    with torch.random.fork_rng():
        for _ in range(2):  # the first draw may look at the programs once more, which no other does
            counter.per_site = {}
            loss = counted.loss(elbo)
            if loss.requires_grad:
                with counter.repeating():
                    torch.autograd.grad(loss, _leaves(loss), allow_unused=True)
    return max(counter.per_site.values(), default=0.0)  # of the site that is scored most often


class _Counter(Messenger):
    """Counts how often each observed site of a model is scored per datapoint.

    A run without a graph is a third of one, as a backward pass takes twice the operations of a forward pass. So is
    a run that the backward pass repeats: its own backward pass was counted with the first.
    """

    def __init__(self) -> None:
        self.per_site: dict[str, float] = {}
        self._share = 1.0

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Count runs as repeated ones in this context."""
        self._share = 1 / 3
        try:
            yield
        finally:
            self._share = 1.0

    def _pyro_post_sample(self, msg: Any) -> None:
        if LOOKS:
            return
        if msg["type"] == "sample" and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            share = self._share if torch.is_grad_enabled() else 1 / 3
            size = math.prod(msg["fn"].batch_shape)
            own = math.prod(f.size for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES)
            self.per_site[msg["name"]] = self.per_site.get(msg["name"], 0.0) + share * size / own


def _leaves(loss: Tensor) -> list[Tensor]:
    """Find all tensors that a loss is differentiable in."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    found: dict[int, Tensor] = {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values()) or [loss]
