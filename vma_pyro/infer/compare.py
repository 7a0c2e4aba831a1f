"""Compare gradient estimators on any Pyro program: bias, variance, signal-to-noise, cost."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm import tqdm

from vma_pyro.infer.baselines import baseline_name, loo, reinforce
from vma_pyro.infer.estimator import Estimator
from vma_pyro.infer.groups import Groups, parameter_groups
from vma_pyro.infer.log_weights import log_weights
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.plates import PARTICLES, PlateNesting, Program
from vma_pyro.infer.reference import EnumeratedReference, GuideSites, guide_sites
from vma_pyro.infer.rloo import RLOO

RANDOM_DIRECTIONS = 16
REFERENCES = ("iwae", "elbo")  # objectives whose gradient can be had in another way


class Row(NamedTuple):
    """One estimator's gradient of one group of parameters. g: one draw; G: the reference gradient.

    Attributes:
        estimator: its name.
        group: of parameters.
        num_particles: K.
        objective: what it estimates the gradient of.
        claims_unbiased: what the estimator says of itself.
        bias_z: the largest |z-score| of mean g - G over the direction of G and 16 random directions. Below 4 for
        an
            estimator without bias.
        relative_variance: E|g - E g|^2 / |G|^2; for an estimator that is held to another objective's gradient
            / |E g|^2, as it has another length.
        snr: |E g| / sqrt(E|g - E g|^2), bias-corrected for the number of draws.
        directional_snr: E of |part of g along G| / |part of g across G| (Rainforth et al. 2018).
        cosine: of E g to G.
        effective_samples: of K draws from the guide, mean over datapoints of (sum w)^2 / sum w^2.
        evaluations: runs of the model's observed sites per datapoint.
        milliseconds: per gradient, median.
        variance_time: relative_variance times milliseconds: what a given precision costs.
        variance_evaluations: relative_variance times evaluations.
        draws: gradients drawn.
        reference: how G was found.
    """

    estimator: str
    group: str
    num_particles: int
    objective: str
    claims_unbiased: bool
    bias_z: float
    relative_variance: float
    snr: float
    directional_snr: float
    cosine: float
    effective_samples: float
    evaluations: float
    milliseconds: float
    variance_time: float
    variance_evaluations: float
    draws: int
    reference: str


class Comparison(NamedTuple):
    """A table of estimators by groups of parameters.

    Attributes:
        rows: one for each estimator and group.
        seed: of all draws.
    """

    rows: tuple[Row, ...]
    seed: int

    def of(self, estimator: str, group: str) -> Row:
        """One row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.estimator, row.group) == (estimator, group):
                return row
        raise KeyError(f"no row for estimator {estimator!r} and group {group!r}")

    def plain(self) -> dict[str, Any]:
        """Numbers, strings and lists alone; figures that are not finite become None."""
        return {
            "seed": self.seed,
            "rows": [{k: _finite(v) for k, v in row._asdict().items()} for row in self.rows],
        }

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Comparison:
        """The inverse; None becomes NaN."""
        rows: list[dict[str, Any]] = [
            {k: math.nan if v is None else v for k, v in row.items()} for row in content["rows"]
        ]
        return cls(tuple(Row(**row) for row in rows), content["seed"])

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(self.plain(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """One table per group, the cheapest way to a given precision first."""
        parts = []
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = sorted((r for r in self.rows if r.group == group), key=lambda r: _last_if_nan(r.variance_time))
            parts += [f"### {group}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
            parts += ["| " + " | ".join(show(row) for show in COLUMNS.values()) + " |" for row in rows]
            parts += [""]
        return "\n".join(parts)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "estimator": lambda r: r.estimator,
    "objective": lambda r: r.objective + ("" if r.claims_unbiased else ", biased"),
    "K": lambda r: str(r.num_particles),
    "model runs": lambda r: f"{r.evaluations:.3g}",
    "bias, max abs z": lambda r: f"{r.bias_z:.1f}",
    "variance / G²": lambda r: f"{r.relative_variance:.3g}",
    "SNR": lambda r: f"{r.snr:.3g}",
    "directional SNR": lambda r: f"{r.directional_snr:.3g}",
    "cosine": lambda r: f"{r.cosine:.3f}",
    "ESS": lambda r: f"{r.effective_samples:.2f}",
    "ms": lambda r: f"{r.milliseconds:.1f}",
    "variance x time": lambda r: f"{r.variance_time:.3g}",
}


def compare(
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    estimators: Mapping[str, ELBO],
    draws: int = 200,
    reference_draws: int | None = None,
    groups: Groups | None = None,
    batch_plates: Sequence[str] = ("data",),
    warm_up: int = 100,
    seed: int = 0,
    show_progress: bool = True,
) -> Comparison:
    """Draw each estimator's gradient many times on the same data, and hold it to a reference.

    The reference is the gradient of the estimator's own objective. For the K-sample bound and the single-sample
    one the discrete sites are enumerated where that is feasible (exact for a program without continuous sites),
    else it is a long run of `loo` or `RLOO`; an unbiased estimator of another objective ("exact", "distinct", ...)
    is held to a longer run of itself, and a biased one to the gradient of the K-sample bound: its z-score tells
    how far it is.

    Args:
        model, guide: any Pyro programs: modules, or functions with `pyro.param`.
        args, kwargs: their arguments: the data.
        estimators: by name; see `make` and `matched`.
        draws: gradients of each.
        reference_draws: gradients of the reference; 4 times `draws` by default.
        groups: parameters by name of group; `parameter_groups` by default.
        batch_plates: plates whose elements are the datapoints.
        warm_up: draws on which learned baselines are trained first.
        seed: of all draws.
        show_progress: whether to draw a progress bar.

    Returns:
        The table.

    Raises:
        ValueError: fewer than 2 draws, no estimators, no parameters; and what the estimators refuse.
    """
    kwargs = kwargs or {}
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, got {draws}")
    if not estimators:
        raise ValueError("estimators: expected at least one, got none")
    programs = _Programs(model, guide, args, kwargs, tuple(batch_plates))
    groups = groups or programs.groups()
    if not any(groups.values()):
        raise ValueError("groups: expected parameters that require a gradient, found none")
    table = _Table(programs, groups, draws, reference_draws or 4 * draws, seed)
    rows: list[Row] = []
    with torch.random.fork_rng(), tqdm(estimators.items(), disable=not show_progress, unit="estimator") as bar:
        for name, elbo in bar:
            bar.set_description(name)
            rows += table.rows_of(name, elbo, warm_up)
    return Comparison(tuple(rows), seed)


def matched(
    names: Sequence[str],
    make: Callable[[str, int], ELBO],
    evaluations: int,
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    batch_plates: Sequence[str] = ("data",),
) -> dict[str, ELBO]:
    """Estimators with as many particles as make at most so many runs of the model per datapoint.

    Args:
        names: of estimators.
        make: from a name and K to an objective.
        evaluations: the budget. An estimator that cannot do with it keeps its least K.
        model, guide, args, kwargs, batch_plates: as for `compare`.
    """
    programs = _Programs(model, guide, args, kwargs or {}, tuple(batch_plates))
    found: dict[str, ELBO] = {}
    for name in names:
        # From above: the largest K within the budget, or the smallest that the estimator accepts.
        for k in range(evaluations, 0, -1):
            try:
                elbo = make(name, k)
                cost = programs.evaluations(elbo)
            except ValueError:
                break
            found[name] = elbo
            if cost <= evaluations:
                break
        if name not in found:
            raise ValueError(f"evaluations: expected enough for estimator '{name}', got {evaluations}")
    return found


def evaluations_of(
    elbo: ELBO,
    model: Program,
    guide: Program,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    batch_plates: Sequence[str] = ("data",),
) -> float:
    """Runs of the model's observed sites per datapoint that one gradient takes, counted in one draw."""
    return _Programs(model, guide, args, kwargs or {}, tuple(batch_plates)).evaluations(elbo)


class _Programs:
    """Two programs and their data."""

    def __init__(
        self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any], plates: tuple[str, ...]
    ) -> None:
        self.model, self.guide, self.args, self.kwargs, self.plates = model, guide, args, kwargs, plates
        self.nesting = PlateNesting()(model, guide, args, kwargs)

    def groups(self) -> dict[str, list[Tensor]]:
        return parameter_groups(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            batch_plates=self.plates,
            max_plate_nesting=self.nesting,
        )

    def sites(self) -> GuideSites:
        return guide_sites(self.guide, self.args, self.kwargs)

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
        return elbo.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)

    def evaluations(self, elbo: Any) -> float:
        """Runs of the model's observed sites per datapoint, counted."""
        counter = _Counter(self.plates)
        with torch.random.fork_rng():
            elbo.differentiable_loss(counter(self.model), self.guide, *self.args, **self.kwargs)
        return counter.runs


class _Counter(Messenger):
    """Counts how often the observed sites of a model are scored per datapoint; the most of them counts."""

    def __init__(self, batch_plates: tuple[str, ...]) -> None:
        super().__init__()
        self.batch_plates = batch_plates
        self.per_site: dict[str, float] = {}

    @property
    def runs(self) -> float:
        return max(self.per_site.values(), default=0.0)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            size = math.prod(msg["fn"].batch_shape)
            own = math.prod(f.size for f in msg["cond_indep_stack"] if f.vectorized and not _is_particle(f))
            self.per_site[msg["name"]] = self.per_site.get(msg["name"], 0.0) + size / own


def _is_particle(frame: Any) -> bool:
    return frame.name == PARTICLES


class _Moments:
    """Running mean and variance of gradients, and their parts along given directions."""

    def __init__(self, size: int, directions: Tensor | None) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        self.directions = directions  # [D, size], of length one; the first is the reference's
        self.along: list[Tensor] = []
        self.ratios: list[float] = []

    def add(self, g: Tensor) -> None:
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
        return self.squares.sum().item() / (self.count - 1)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Mean along each direction, and its squared standard error."""
        along = torch.stack(self.along)
        return along.mean(0), along.var(0) / self.count


class _Reference(NamedTuple):
    how: str
    is_own: bool
    gradients: dict[str, Tensor]
    directions: dict[str, Tensor]
    errors: dict[str, Tensor]  # squared standard errors of the projections


class _Table:
    """Draws gradients; references are found once for each objective and K."""

    def __init__(self, programs: _Programs, groups: Groups, draws: int, reference_draws: int, seed: int) -> None:
        self.programs, self.groups, self.draws, self.seed = programs, groups, draws, seed
        self.reference_draws = reference_draws
        self.sites = programs.sites()
        self.known: dict[tuple[str, int], _Reference] = {}

    def rows_of(self, name: str, elbo: Any, warm_up: int) -> list[Row]:
        elbo = copy.copy(elbo)
        self._train_learned_parts(elbo, warm_up)
        K = elbo.num_particles
        reference = self._reference(elbo)
        torch.manual_seed(self.seed)
        pyro.set_rng_seed(self.seed)
        moments = {g: _Moments(len(reference.gradients[g]), reference.directions[g]) for g in self.groups}
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
        moments: _Moments,
        reference: _Reference,
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

    def _draw_all(self, elbo: Any, draws: int, moments: Mapping[str, _Moments]) -> float:
        """Gradients into moments; returns the median time in milliseconds."""
        parameters = [p for group in self.groups.values() for p in group]
        seconds = []
        for _ in range(draws):
            start = time.perf_counter()
            loss = self.programs.loss(elbo)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            seconds.append(time.perf_counter() - start)
            flat = iter(gradients)
            for name, group in self.groups.items():
                parts = [torch.zeros_like(p) if (g := next(flat)) is None else g for p in group]
                moments[name].add(torch.cat([part.flatten() for part in parts]).double().cpu())
        return 1000 * sorted(seconds)[draws // 2]

    def _reference(self, elbo: Any) -> _Reference:
        objective, K = objective_of(elbo), elbo.num_particles
        if objective not in REFERENCES:
            if getattr(elbo, "unbiased", True):
                return self._find_reference(objective, K, elbo)
            objective = "iwae"
        K = 1 if objective == "elbo" else K
        if (objective, K) not in self.known:
            self.known[objective, K] = self._find_reference(objective, K, elbo)
        return self.known[objective, K]

    def _find_reference(self, objective: str, K: int, elbo: Any) -> _Reference:
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
            if not self.sites.has_reparameterised:
                draws, how = 2, "exact, by enumeration"
        elif objective == "elbo":
            judge, how = RLOO(8, **plates), "a long run of rloo, K = 8"
        else:
            judge = MultiSampleELBO(K, baseline=loo if K > 1 else reinforce, **plates)
            how = f"a long run of {baseline_name(judge.baseline)}, K = {K}"
        torch.manual_seed(self.seed + 1)
        sizes = {name: sum(p.numel() for p in group) for name, group in self.groups.items()}
        first = {name: _Moments(size, None) for name, size in sizes.items()}
        self._draw_all(judge, draws, first)
        gradients = {name: moments.mean for name, moments in first.items()}
        directions = {name: self._directions(G) for name, G in gradients.items()}
        # Along each direction the error is taken from a second, shorter run: the directions depend on the first.
        second = {name: _Moments(size, directions[name]) for name, size in sizes.items()}
        self._draw_all(judge, max(2, draws // 4), second)
        errors = {name: m.projections()[1] * m.count / draws for name, m in second.items()}
        return _Reference(how, is_own, gradients, directions, errors)

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


def fit_slope(num_particles: Sequence[int], snr: Sequence[float]) -> float:
    """Least-squares slope of log SNR against log K.

    Raises:
        ValueError: fewer than two points, or a value that is not above 0.
    """
    if len(num_particles) < 2 or len(num_particles) != len(snr):
        raise ValueError(f"snr: expected at least 2 values, one per K, got {len(snr)} for {len(num_particles)} K")
    if not all(0 < value < math.inf for value in (*num_particles, *snr)):
        raise ValueError(f"snr: expected finite values above 0, got {list(snr)}")
    x = torch.tensor(num_particles, dtype=torch.float64).log()
    y = torch.tensor(snr, dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_if_nan(value: float) -> float:
    return value if math.isfinite(value) else math.inf
