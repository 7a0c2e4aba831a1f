"""Drawing gradients, and holding them to a reference."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.baselines import baseline_name, loo, reinforce
from vma_pyro.infer.comparison import Row
from vma_pyro.infer.estimator import Estimator
from vma_pyro.infer.first_look import look
from vma_pyro.infer.groups import Groups, parameter_groups
from vma_pyro.infer.log_weights import log_weights
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.plates import PARTICLES, PlateNesting, Program
from vma_pyro.infer.reference import EnumeratedReference, GuideSites, guide_sites
from vma_pyro.infer.rloo import RLOO

RANDOM_DIRECTIONS = 16
REFERENCES = ("iwae", "elbo")  # objectives whose gradient can be had in another way


class Programs:
    """Two programs and their data."""

    def __init__(
        self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any], plates: tuple[str, ...]
    ) -> None:
        self.model, self.guide, self.args, self.kwargs, self.plates = model, guide, args, kwargs, plates
        self.nesting = PlateNesting()(model, guide, args, kwargs)

    def groups(self) -> dict[str, list[Tensor]]:
        """The parameters by what they parameterise."""
        return parameter_groups(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            batch_plates=self.plates,
            max_plate_nesting=self.nesting,
        )

    def sites(self) -> GuideSites:
        """The guide's latent sites."""
        return guide_sites(self.guide, self.args, self.kwargs, self.plates)

    def weights(self, num_particles: int) -> Tensor:
        """log w [K, B]."""
        with torch.no_grad():
            return log_weights(
                self.model,
                self.guide,
                self.args,
                self.kwargs,
                num_particles=num_particles,
                batch_plates=self.plates,
                max_plate_nesting=self.nesting,
            )

    def loss(self, elbo: Any) -> Tensor:
        """Minus the objective, differentiable."""
        return elbo.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)

    def evaluations(self, elbo: Any) -> float:
        """Runs of the model's observed sites per datapoint, counted."""
        counter = _Counter(self.plates)
        counted = counter(self.model)
        look.check(counted, self.guide, self.args, self.kwargs, self.nesting)  # not in the cost of an estimator
        counter.per_site.clear()
        with torch.random.fork_rng():
            elbo.differentiable_loss(counted, self.guide, *self.args, **self.kwargs)
        return counter.runs


class _Counter(Messenger):
    """Counts how often the observed sites of a model are scored per datapoint; the most of them counts.

    A run without a graph is a third of one: a backward pass takes twice the operations of a forward pass.
    """

    def __init__(self, batch_plates: tuple[str, ...]) -> None:
        super().__init__()
        self.batch_plates = batch_plates
        self.per_site: dict[str, float] = {}

    @property
    def runs(self) -> float:
        """Runs of the site that is scored most often."""
        return max(self.per_site.values(), default=0.0)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            share = 1.0 if torch.is_grad_enabled() else 1 / 3
            size = math.prod(msg["fn"].batch_shape)
            own = math.prod(f.size for f in msg["cond_indep_stack"] if f.vectorized and not _is_particle(f))
            self.per_site[msg["name"]] = self.per_site.get(msg["name"], 0.0) + share * size / own


def _is_particle(frame: Any) -> bool:
    return frame.name == PARTICLES


class Moments:
    """Running mean and variance of gradients, and their parts along given directions."""

    def __init__(self, size: int, directions: Tensor | None) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        self.directions = directions  # [D, size], of length one; the first is the reference's
        self.along: list[Tensor] = []
        self.ratios: list[float] = []

    def add(self, g: Tensor) -> None:
        """One more gradient."""
        self.count += 1
        difference = g - self.mean
        self.mean += difference / self.count
        self.squares += difference * (g - self.mean)
        if self.directions is not None:
            along = self.directions @ g
            self.along.append(along)
            across = (g.square().sum() - along[0] ** 2).clamp(min=0).sqrt()
            self.ratios.append((along[0].abs() / across).item() if across > 0 else math.inf)

    def variance(self) -> float:
        """Sum over components of the variance."""
        return self.squares.sum().item() / (self.count - 1)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Mean along each direction, and its squared standard error."""
        along = torch.stack(self.along)
        return along.mean(0), along.var(0) / self.count


class Reference(NamedTuple):
    """A reference gradient by group of parameters.

    Attributes:
        how: it was found.
        is_own: whether it is a run of the estimator itself.
        gradients: G.
        directions: of length one, that of G and random ones [D, parameters].
        errors: squared standard errors of G along them [D].
    """

    how: str
    is_own: bool
    gradients: dict[str, Tensor]
    directions: dict[str, Tensor]
    errors: dict[str, Tensor]


class Measurement:
    """Draws gradients; references are found once for each objective and K."""

    def __init__(self, programs: Programs, groups: Groups, draws: int, reference_draws: int, seed: int) -> None:
        self.programs, self.groups, self.draws, self.seed = programs, groups, draws, seed
        self.reference_draws = reference_draws
        self.sites = programs.sites()
        self.known: dict[tuple[str, int], Reference] = {}

    def rows_of(self, name: str, elbo: Any, warm_up: int) -> list[Row]:
        """One row per group."""
        elbo = copy.deepcopy(elbo)  # what it learns here stays here
        self._train_learned_parts(elbo, warm_up)
        K = elbo.num_particles
        reference = self._reference(elbo)
        torch.manual_seed(self.seed)
        moments = {g: Moments(len(reference.gradients[g]), reference.directions[g]) for g in self.groups}
        milliseconds = self._draw_all(elbo, self.draws, moments)
        log_w = self.programs.weights(K)
        ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().mean().item()
        evaluations = self.programs.evaluations(elbo)
        return [
            self._row(name, elbo, group, moments[group], reference, ess, evaluations, milliseconds)
            for group in self.groups
        ]

    def _row(
        self,
        name: str,
        elbo: Any,
        group: str,
        moments: Moments,
        reference: Reference,
        ess: float,
        evaluations: float,
        milliseconds: float,
    ) -> Row:
        G = reference.gradients[group]
        square = G.square().sum().item()
        variance = moments.variance()
        # The mean of n draws has the variance's n-th part in its squared length.
        signal = max(0.0, moments.mean.square().sum().item() - variance / moments.count)
        mean, error = moments.projections()
        difference = mean - reference.directions[group] @ G
        spread = (error + reference.errors[group]).sqrt()
        noise_floor = 1e-9 * max(square, 1e-300) ** 0.5
        z = torch.where(difference.abs() <= noise_floor, 0.0, difference.abs() / spread.clamp(min=1e-300))
        # What is held to the gradient of another objective has another length: compare it with itself.
        own = objective_of(elbo) in REFERENCES or reference.is_own
        length = square if own else signal
        if variance < 1e-18 * max(square, signal):  # rounding
            variance = 0.0
        relative = variance / length if length > 0 else math.nan
        return Row(
            estimator=name,
            group=group,
            num_particles=elbo.num_particles,
            objective=objective_of(elbo),
            claims_unbiased=getattr(elbo, "unbiased", True),
            bias_z=z.max().item(),
            relative_variance=relative,
            snr=math.sqrt(signal / variance) if variance > 0 else math.inf,
            directional_snr=sum(moments.ratios) / len(moments.ratios),
            cosine=torch.nn.functional.cosine_similarity(moments.mean, G, dim=0).item(),
            effective_samples=ess,
            evaluations=evaluations,
            milliseconds=milliseconds,
            variance_time=relative * milliseconds,
            variance_evaluations=relative * evaluations,
            draws=self.draws,
            reference=reference.how,
        )

    def _draw_all(self, elbo: Any, draws: int, moments: Mapping[str, Moments]) -> float:
        """Gradients into moments; returns the median time in milliseconds."""
        parameters = [p for group in self.groups.values() for p in group]
        seconds = []
        for _ in range(draws):
            start = time.perf_counter()
            loss = self.programs.loss(elbo)
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            seconds.append(time.perf_counter() - start)
            flat = iter(gradients)
            for name, group in self.groups.items():
                parts = [torch.zeros_like(p) if (g := next(flat)) is None else g for p in group]
                moments[name].add(torch.cat([part.flatten() for part in parts]).cpu().double())
        return 1000 * sorted(seconds)[draws // 2]

    def _reference(self, elbo: Any) -> Reference:
        objective, K = objective_of(elbo), elbo.num_particles
        if objective not in REFERENCES:
            if getattr(elbo, "unbiased", True):
                return self._find_reference(objective, K, elbo)
            objective = "iwae"
        K = 1 if objective == "elbo" else K
        if (objective, K) not in self.known:
            self.known[objective, K] = self._find_reference(objective, K, elbo)
        return self.known[objective, K]

    def _find_reference(self, objective: str, K: int, elbo: Any) -> Reference:
        plates: dict[str, Any] = {"batch_plates": self.programs.plates, "max_plate_nesting": self.programs.nesting}
        datapoints = self.programs.weights(1).shape[1]
        judge: Any
        draws = self.reference_draws
        is_own = objective not in REFERENCES
        if is_own:
            judge, how = elbo, "a longer run of itself"
        elif self.sites.can_be_enumerated(K, datapoints):
            names = [site.name for site in self.sites.discrete]
            judge = EnumeratedReference(K, sites=names, single_sample=objective == "elbo", **plates)
            how = "discrete sites enumerated"
            if not self.sites.is_random_otherwise:
                draws, how = 2, "exact, by enumeration"
        elif objective == "elbo":
            judge, how = RLOO(8, **plates), "a long run of rloo, K = 8"
        else:
            judge = MultiSampleELBO(K, baseline=loo if K > 1 else reinforce, **plates)
            how = f"a long run of {baseline_name(judge.baseline)}, K = {K}"
        torch.manual_seed(self.seed + 1)
        sizes = {name: sum(p.numel() for p in group) for name, group in self.groups.items()}
        first = {name: Moments(size, None) for name, size in sizes.items()}
        self._draw_all(judge, draws, first)
        gradients = {name: moments.mean for name, moments in first.items()}
        directions = {name: self._directions(G) for name, G in gradients.items()}
        # Along each direction the error is taken from a second, shorter run: the directions depend on the first.
        second = {name: Moments(size, directions[name]) for name, size in sizes.items()}
        self._draw_all(judge, max(2, draws // 4), second)
        errors = {name: m.projections()[1] * m.count / draws for name, m in second.items()}
        return Reference(how, is_own, gradients, directions, errors)

    def _directions(self, G: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.randn(RANDOM_DIRECTIONS, len(G), generator=generator, dtype=torch.float64)
        directions = torch.cat([G[None], random])
        return torch.nn.functional.normalize(directions, dim=1)

    def _train_learned_parts(self, elbo: Any, warm_up: int) -> None:
        """Baselines and critics learn on the same data before they are measured, and then stay as they are."""
        parts = elbo.learned_parts() if isinstance(elbo, Estimator) else {}
        if not parts:
            return
        parameters = [p for part in parts.values() for p in part.parameters()]
        optimizer = torch.optim.Adam(parameters, 1e-2) if parameters else None
        for _ in range(warm_up):
            loss = self.programs.loss(elbo)
            if optimizer is not None:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for p, g in zip(parameters, gradients, strict=True):
                    p.grad = g
                optimizer.step()
        for part in parts.values():
            part.eval()


def objective_of(elbo: ELBO) -> str:
    """What an objective says it estimates; Pyro's own say nothing, and are single-sample bounds."""
    return getattr(elbo, "objective", "elbo")
