"""The table of estimators: its rows, and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vma_pyro._system.markdown import table


class Row(NamedTuple):
    """One estimator's gradient of one group of parameters. g: one draw; G: the reference gradient.

    Attributes:
        estimator: its name.
        group: of parameters.
        num_particles: K.
        objective: what it estimates the gradient of.
        claims_unbiased: what the estimator says of itself.
        bias_z: the largest |z-score| of mean g - G over the direction of G and 16 random directions. Below 4
            for an estimator without bias.
        relative_variance: E|g - E g|^2 / |G|^2; for an estimator that is held to another objective's gradient
            / |E g|^2, as it has another length.
        snr: |E g| / sqrt(E|g - E g|^2), bias-corrected for the number of draws.
        directional_snr: sqrt(E g_par^2 / E g_perp^2), parts of g along and across G (after Rainforth et al. 2018,
            who take the mean of the ratio, which has hardly a mean itself). NaN for a single parameter.
        cosine: of E g to G.
        effective_samples: of K draws from the guide, mean over datapoints and up to 100 draws of
            (sum w)^2 / sum w^2. A property of guide and K, the same for all estimators with the same K; NaN for
            K = 1, and for "exact", which draws none.
        evaluations: runs of the model per datapoint; one without a graph is a third of one, as a backward pass
            takes twice the operations of a forward pass, and so is one that the backward pass repeats.
        milliseconds: per gradient, median.
        variance_time: relative_variance times milliseconds: what a given precision costs.
        draws: gradients drawn.
        reference: how G was found.
        reference_error: standard error of G as a whole, over |G|; 0 for an exact one, NaN in old tables.

    NaN is undefined: all ratios of an estimator that has a gradient of exactly zero there, as it does not train
    the group, and bias_z if G is zero as well.
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
    draws: int
    reference: str
    reference_error: float = math.nan


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
        """The inverse; None becomes NaN. Figures that only earlier tables had are left out."""
        rows: list[dict[str, Any]] = [
            {k: math.nan if v is None else v for k, v in row.items() if k in Row._fields}
            for row in content["rows"]
        ]
        return cls(tuple(Row(**row) for row in rows), content["seed"])

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(self.plain(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """One table per group, the cheapest way to a given precision first, and below them the references."""
        references = list(dict.fromkeys(row.reference for row in self.rows))
        parts = []
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = sorted((r for r in self.rows if r.group == group), key=lambda r: _last_if_nan(r.variance_time))
            cells = [
                [
                    *(show(row) for show in COLUMNS.values()),
                    _reference(references.index(row.reference) + 1, row.reference_error),
                ]
                for row in rows
            ]
            parts += [f"### {group}", "", table([*COLUMNS, "reference"], cells), ""]
        parts += ["References, with the standard error of those that are sampled, relative to their length:", ""]
        return "\n".join([*parts, *(f"{i}. {how}" for i, how in enumerate(references, 1)), ""])


def _number(value: float, form: str = ".3g") -> str:
    """A dash where it is undefined."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def _reference(number: int, error: float) -> str:
    """Its number in the list, and its error if it was sampled."""
    return f"{number}" if error == 0 or math.isnan(error) else f"{number} (±{100 * error:.2g} %)"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "estimator": lambda r: r.estimator,
    "objective": lambda r: r.objective + ("" if r.claims_unbiased else ", biased"),
    "K": lambda r: str(r.num_particles),
    "model runs": lambda r: f"{r.evaluations:.3g}",
    "bias, max abs z": lambda r: _number(r.bias_z, ".1f"),
    "variance / G²": lambda r: _number(r.relative_variance),
    "SNR": lambda r: _number(r.snr),
    "directional SNR": lambda r: _number(r.directional_snr),
    "cosine": lambda r: _number(r.cosine, ".3f"),
    "ESS": lambda r: _number(r.effective_samples, ".2f"),
    "ms": lambda r: f"{r.milliseconds:.1f}",
    "variance x time": lambda r: _number(r.variance_time),
}


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
