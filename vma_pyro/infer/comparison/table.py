"""The table of estimators."""

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
        estimator: the estimator's name.
        group: the group of parameters.
        num_particles: K.
        objective: what it estimates the gradient of.
        claims_unbiased: whether it says of itself that it is unbiased.
        bias_z: the largest |z-score| of mean g - G over the direction of G and 16 random directions. Below 4
            for an estimator without bias.
        relative_variance: E|g - E g|^2 / |G|^2; with |E g|^2 below where G is another objective's, of another
            length.
        snr: |E g| / sqrt(E|g - E g|^2), bias-corrected for the number of draws.
        directional_snr: sqrt(E g_par^2 / E g_perp^2), parts of g along and across G (after Rainforth et al. 2018,
            who take the mean of the ratio, which has hardly a mean itself). NaN for a single parameter.
        cosine: the cosine of E g and G.
        effective_samples: (sum w)^2 / sum w^2 of K draws from the guide, mean over datapoints and up to 100 draws.
            The same for all estimators with the same K; NaN for K = 1, and for "exact", which draws none.
        evaluations: runs of the model per datapoint; one without a graph is a third of one, as a backward pass
            takes twice the operations of a forward pass, and so is one that the backward pass repeats.
        milliseconds: median time per gradient.
        variance_time: relative_variance times milliseconds: what a given precision costs.
        draws: number of gradients drawn.
        reference: how G was found.
        reference_error: standard error of G as a whole, over |G|; 0 for an exact one, NaN in old tables.

    NaN is undefined: all ratios where the gradient is exactly zero, as the estimator does not train the group, and
    bias_z if G is zero as well.
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
        rows: one row for each estimator and group.
        seed: the seed of all draws.
    """

    rows: tuple[Row, ...]
    seed: int

    def of(self, estimator: str, group: str) -> Row:
        """Find one row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.estimator, row.group) == (estimator, group):
                return row
        raise KeyError(f"no row for estimator {estimator!r} and group {group!r}")

    def plain(self) -> dict[str, Any]:
        """Turn the table into numbers, strings and lists; figures that are not finite become None."""
        rows = [{k: _finite(v) for k, v in row._asdict().items()} for row in self.rows]
        return {"seed": self.seed, "rows": rows}

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Comparison:
        """Invert `plain`; None becomes NaN. Figures that only earlier tables had are left out."""
        rows: list[dict[str, Any]] = [
            {k: math.nan if v is None else v for k, v in row.items() if k in Row._fields}
            for row in content["rows"]
        ]
        return cls(tuple(Row(**row) for row in rows), content["seed"])

    def to_json(self) -> str:
        """Write all figures as JSON."""
        return json.dumps(self.plain(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """Write one table per group, the cheapest way to a given precision first, and the references below."""
        references = list(dict.fromkeys(row.reference for row in self.rows))

        def cells(row: Row) -> list[str]:
            number = references.index(row.reference) + 1
            return [*(show(row) for show in COLUMNS.values()), _reference(number, row.reference_error)]

        parts = []
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = sorted(
                (row for row in self.rows if row.group == group),
                key=lambda row: (not math.isfinite(row.variance_time), row.variance_time),
            )
            parts += [f"### {group}", "", table([*COLUMNS, "reference"], [cells(row) for row in rows]), ""]
        parts += ["References, with the standard error of those that are sampled, relative to their length:", ""]
        return "\n".join([*parts, *(f"{i}. {how}" for i, how in enumerate(references, 1)), ""])


def _number(value: float, form: str = ".3g") -> str:
    """Show a number; a dash where it is undefined."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def _reference(number: int, error: float) -> str:
    """Show the number of a reference in the list, and its error if it was sampled."""
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
    """Fit the slope of log SNR against log K by least squares.

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
