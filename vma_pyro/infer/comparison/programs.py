"""Two programs and their data, as a comparison sees them: parameters, sites, weights, gradients, costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.comparison.groups import Groups, parameter_groups
from vma_pyro.infer.comparison.reference import GuideSites, guide_sites
from vma_pyro.infer.engine.log_weights import draw_particles
from vma_pyro.infer.engine.plates import PARTICLES, PlateNesting, Program


class Programs:
    """Two programs and their data.

    Args:
        model, guide, args, kwargs: the programs, and their arguments.
        plates: whose elements are the datapoints; none: the whole program is one.
    """

    def __init__(
        self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any], plates: tuple[str, ...]
    ) -> None:
        self.model, self.guide, self.args, self.kwargs, self.plates = model, guide, args, kwargs, plates
        self.nesting = PlateNesting()(model, guide, args, kwargs)
        self.parameters: list[Tensor] = []

    @property
    def plate_options(self) -> dict[str, Any]:
        """For an estimator of these programs."""
        return {"batch_plates": self.plates, "max_plate_nesting": self.nesting}

    def groups(self) -> dict[str, list[Tensor]]:
        """The parameters by what they parameterise."""
        return parameter_groups(self.model, self.guide, self.args, self.kwargs, **self.plate_options)

    def measure(self, groups: Groups) -> None:
        """Take gradients in these parameters from now on."""
        self.parameters = [p for group in groups.values() for p in group]

    def sites(self) -> GuideSites:
        """The guide's latent sites."""
        return guide_sites(self.guide, self.args, self.kwargs, self.plates)

    @functools.cached_property
    def datapoints(self) -> int:
        """B."""
        return self.weights(1).shape[1]

    def weights(self, num_particles: int, *, vectorize: bool = True) -> Tensor:
        """log w [K, B]."""
        with torch.no_grad():
            return draw_particles(
                self.model,
                self.guide,
                self.args,
                self.kwargs,
                num_particles=num_particles,
                vectorize=vectorize,
                pathwise=None,
                **self.plate_options,
            ).log_weights

    def loss(self, elbo: Any) -> Tensor:
        """Minus the objective, differentiable."""
        return elbo.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)

    def gradients(self, elbo: Any) -> list[Tensor]:
        """One draw of the gradient in each of the parameters; zeros in those that the loss does not have."""
        loss = self.loss(elbo)
        found: Sequence[Tensor | None] = [None] * len(self.parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def evaluations(self, elbo: Any) -> float:
        """Runs of the model's observed sites per datapoint, counted in one gradient, backward pass included."""
        counter = _Counter()
        model = counter(self.model)
        with torch.random.fork_rng():
            for _ in range(2):  # the first draw may look at the programs once more, which no other does
                counter.reset()
                loss = elbo.differentiable_loss(model, self.guide, *self.args, **self.kwargs)
                if loss.requires_grad:
                    with counter.backward():
                        torch.autograd.grad(loss, _leaves(loss), allow_unused=True)
        return counter.runs


class _Counter(Messenger):
    """Counts how often the observed sites of a model are scored per datapoint; the most of them counts.

    A run without a graph is a third of one, as a backward pass takes twice the operations of a forward pass. So is
    one that is repeated in the backward pass: its own backward pass was counted with the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.per_site: dict[str, float] = {}
        self._share = 1.0

    def reset(self) -> None:
        """Forget what was counted."""
        self.per_site = {}

    def backward(self) -> _Backward:
        """A context in which runs are repeated ones."""
        return _Backward(self)

    @property
    def runs(self) -> float:
        """Runs of the site that is scored most often."""
        return max(self.per_site.values(), default=0.0)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            share = self._share if torch.is_grad_enabled() else 1 / 3
            size = math.prod(msg["fn"].batch_shape)
            own = math.prod(f.size for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES)
            self.per_site[msg["name"]] = self.per_site.get(msg["name"], 0.0) + share * size / own


class _Backward:
    def __init__(self, counter: _Counter) -> None:
        self.counter = counter

    def __enter__(self) -> None:
        self.counter._share = 1 / 3

    def __exit__(self, *error: Any) -> None:
        self.counter._share = 1.0


def _leaves(loss: Tensor) -> list[Tensor]:
    """All tensors that a loss is differentiable in."""
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
