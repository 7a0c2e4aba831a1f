"""Drawing gradients, and comparing them with a reference."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor

from vma_pyro.infer.comparison.evaluations import count_evaluations
from vma_pyro.infer.comparison.judges import Judge, Judges, objective_of
from vma_pyro.infer.comparison.moments import Moments
from vma_pyro.infer.comparison.subject import Subject
from vma_pyro.infer.comparison.table import Row
from vma_pyro.infer.engine.estimator import Estimator
from vma_pyro.infer.engine.running import PROGRAM_ERRORS
from vma_pyro.infer.engine.weights import effective_samples

RANDOM_DIRECTIONS = 16
WEIGHT_DRAWS = 100  # for the effective sample size: at most


class Reference(NamedTuple):
    """A reference gradient G by group of parameters."""

    judge: Judge
    gradients: dict[str, Tensor]
    directions: dict[str, Tensor]  # of length one, that of G and random ones [D, parameters]
    errors: dict[str, Tensor]  # squared standard errors of G along them [D]
    relative_errors: dict[str, float]  # standard error of G as a whole over |G|; 0 where it is exact


class Measurement:
    """Draws gradients; references are found once for each objective and K."""

    def __init__(
        self, subject: Subject, draws: int, reference_draws: int, seed: int, reference: str | ELBO | None
    ) -> None:
        self.subject, self.groups, self.seed = subject, subject.groups, seed
        self.draws, self.reference_draws = draws, reference_draws
        self.judges = Judges(subject, copy.deepcopy(reference), reference_draws)
        self._references: dict[int, Reference] = {}
        self._effective: dict[tuple[int, bool], float] = {}

    def measure(self, name: str, elbo: Any, warm_up: int) -> list[Row]:
        """Measure one estimator; returns one row per group."""
        elbo = copy.deepcopy(elbo)  # what it learns here stays here
        self._train_learned_parts(elbo, warm_up)
        reference = self._reference(elbo)
        torch.manual_seed(self.seed)
        moments = {g: Moments(len(reference.gradients[g]), reference.directions[g]) for g in self.groups}
        milliseconds = self._draw_all(elbo, self.draws, moments)
        evaluations = count_evaluations(elbo, self.subject.programs)
        effective = self._effective_samples(elbo)
        judge = reference.judge
        same = objective_of(elbo) == judge.objective and (
            judge.objective == "elbo" or elbo.num_particles == judge.elbo.num_particles
        )
        rows = []
        for group in self.groups:
            quality = self._quality(moments[group], reference, group, same)
            rows.append(
                Row(
                    estimator=name,
                    group=group,
                    num_particles=elbo.num_particles,
                    objective=objective_of(elbo),
                    claims_unbiased=getattr(elbo, "unbiased", True),
                    effective_samples=effective,
                    evaluations=evaluations,
                    milliseconds=milliseconds,
                    variance_time=quality["relative_variance"] * milliseconds,
                    draws=self.draws,
                    reference=judge.how,
                    **quality,
                )
            )
        return rows

    def _quality(
        self, moments: Moments, reference: Reference, group: str, same_objective: bool
    ) -> dict[str, float]:
        """Compute what `Row` says of a group's gradient."""
        G, error = reference.gradients[group], reference.relative_errors[group]
        square = G.square().sum().item()
        variance = moments.variance()
        # The squared length of a mean of n draws has the n-th part of the variance in it.
        signal = max(0.0, moments.mean.square().sum().item() - variance / moments.count)
        # The gradient of another objective than the reference's has another length: compare it with itself.
        length = square if same_objective else signal
        if variance < 1e-18 * max(square, signal):  # rounding
            variance = 0.0
        quality = dict.fromkeys(("bias_z", "relative_variance", "snr", "directional_snr", "cosine"), math.nan)
        if square > 0 or not moments.is_zero():
            quality["bias_z"] = _bias_z(moments, reference, group, self._rounding(reference))
        if not moments.is_zero():
            quality["relative_variance"] = variance / length if length > 0 else math.nan
            quality["snr"] = math.sqrt(signal / variance) if variance > 0 else math.inf
            if square > 0:
                quality["directional_snr"] = moments.directional_snr(error)
                quality["cosine"] = torch.nn.functional.cosine_similarity(moments.mean, G, dim=0).item()
        return quality | {"reference_error": error}

    def _draw_all(self, elbo: Any, draws: int, moments: Mapping[str, Moments]) -> float:
        """Add gradients to the moments; returns the median time in milliseconds."""
        seconds = []
        for _ in range(draws):
            start = time.perf_counter()
            remaining = iter(self.subject.gradients(elbo))
            seconds.append(time.perf_counter() - start)
            for name, group in self.groups.items():
                parts = [next(remaining).flatten() for _ in group]
                moments[name].add(torch.cat(parts).cpu().double())
        return 1000 * sorted(seconds)[draws // 2]

    def _effective_samples(self, elbo: Any) -> float:
        """Average the ESS over as many draws as there are gradients, up to 100, once for each K."""
        K, vectorize = elbo.num_particles, getattr(elbo, "vectorize_particles", True)
        if K == 1 or objective_of(elbo) == "exact":
            return math.nan
        key = (K, vectorize)
        if key not in self._effective:
            torch.manual_seed(self.seed + 2)
            try:
                draws = range(min(self.draws, WEIGHT_DRAWS))
                found = [effective_samples(self.subject.weights(K, vectorize=vectorize)) for _ in draws]
                self._effective[key] = torch.stack(found).nanmean().item()
            except PROGRAM_ERRORS:  # programs that only Pyro's own can run
                self._effective[key] = math.nan
        return self._effective[key]

    def _reference(self, elbo: Any) -> Reference:
        judge = self.judges.find(elbo)
        if judge.is_own:
            return self._find_reference(judge)
        if id(judge.elbo) not in self._references:
            self._references[id(judge.elbo)] = self._find_reference(judge)
        return self._references[id(judge.elbo)]

    def _rounding(self, reference: Reference) -> float:
        """Tell by how much two exact gradients may differ, in the precision of the parameters."""
        length = max(G.square().sum().item() for G in reference.gradients.values()) ** 0.5
        eps = max(torch.finfo(p.dtype).eps for group in self.groups.values() for p in group)
        return max(1e-9, 100 * eps) * max(length, 1e-150)

    def _find_reference(self, judge: Judge) -> Reference:
        draws = 2 if judge.is_exact else self.reference_draws
        torch.manual_seed(self.seed + 1)
        sizes = {name: sum(p.numel() for p in group) for name, group in self.groups.items()}
        first = {name: Moments(size, None) for name, size in sizes.items()}
        self._draw_all(judge.elbo, draws, first)
        gradients = {name: moments.mean for name, moments in first.items()}
        directions = {name: self._directions(G) for name, G in gradients.items()}
        # Along each direction the error is taken from a second, shorter run: the directions depend on the first.
        second = {name: Moments(size, directions[name]) for name, size in sizes.items()}
        self._draw_all(judge.elbo, max(2, draws // 4), second)
        errors = {name: m.projections()[1] * m.count / draws for name, m in second.items()}
        relative = {name: 0.0 if judge.is_exact else m.relative_error() for name, m in first.items()}
        return Reference(judge, gradients, directions, errors, relative)

    def _directions(self, G: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.randn(RANDOM_DIRECTIONS, len(G), generator=generator, dtype=torch.float64)
        directions = torch.cat([G[None], random])
        return torch.nn.functional.normalize(directions, dim=1)

    def _train_learned_parts(self, elbo: Any, warm_up: int) -> None:
        """Train baselines and critics on the same data; while they are measured they stay as they are."""
        parts = elbo.learned_parts() if isinstance(elbo, Estimator) else {}
        if not parts:
            return
        parameters = [p for part in parts.values() for p in part.parameters()]
        optimizer = torch.optim.Adam(parameters, 1e-2) if parameters else None
        for _ in range(warm_up):
            loss = self.subject.programs.loss(elbo)
            if optimizer is not None:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for p, g in zip(parameters, gradients, strict=True):
                    p.grad = g
                optimizer.step()
        for part in parts.values():
            part.eval()


def _bias_z(moments: Moments, reference: Reference, group: str, rounding: float) -> float:
    """Find the largest |z-score| of mean g - G along the directions; 0 where they differ by rounding alone."""
    G = reference.gradients[group]
    mean, error = moments.projections()
    difference = mean - reference.directions[group] @ G
    spread = (error + reference.errors[group]).sqrt()
    z = torch.where(difference.abs() <= rounding, 0.0, difference.abs() / spread.clamp(min=1e-300))
    return z.max().item()
