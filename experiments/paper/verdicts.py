"""A row of the table of claims, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from vma_pyro.evaluation import Mean

Results = Mapping[str, dict[str, Any]]  # name of an experiment to what is in its file


class Claim(NamedTuple):
    """Holds one row of the table of claims.

    Attributes:
        claim: what the paper says.
        paper, reimplementation, ours: figures with their units; "" where there is none.
        verdict: "reproduced", "exceeded" or "not reached", and why; "not measured" without a figure.
        source: name of the results.
        causal: our figures with the causal likelihood, which the paper does not have: they are judged by nothing.
        headline: whether it stands for its experiment in the short form.
    """

    claim: str
    paper: str
    reimplementation: str
    ours: str
    verdict: str
    source: str
    headline: bool = False
    causal: str = ""


def verdict(*, reached: bool, short: str) -> str:
    """Judge a claim that either holds or falls short."""
    return "reproduced" if reached else f"not reached: {short}"


def verdict_against(ours: Mean, paper: float, *, how: str, higher: bool = False) -> str:
    """Judge a figure that the paper has too: better by two standard errors, as good, or worse."""
    better = (ours.mean - paper) * (1 if higher else -1)
    if better > 2 * ours.se:
        return "exceeded"
    return "reproduced" if better > -2 * ours.se else f"not reached: {how}"


def describe_training(content: dict[str, Any]) -> str:
    """Name the budget behind a figure, the usual reason why it falls short."""
    facts = next(iter(content["training"].values()))
    if "training_seconds" not in facts:
        return "training unknown"
    hours = facts["training_seconds"] / 3600
    return (
        f"{facts['updates']:,} updates, width {facts['width']:g}, {hours:.1f} h of {content['versions']['device']}"
    )


def verdict_on_growth(gaps: Mapping[int, Mean]) -> str:
    """Judge gaps by number of classes: above zero at the most, and larger than at the fewest."""
    first, last = gaps[min(gaps)], gaps[max(gaps)]
    grows, error = last.mean - first.mean, math.hypot(last.se, first.se)
    reached = last.mean > 2 * last.se and grows > 2 * error
    return verdict(reached=reached, short=f"grows by {grows:.2f} ± {error:.2f} to {last.mean:.2f} ± {last.se:.2f}")


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Say which results cannot be read."""
    try:
        yield
    except (LookupError, TypeError, ValueError, StopIteration, AttributeError) as error:
        raise ValueError(
            f"results: expected {name}.json as its experiment writes it, got {type(error).__name__} ({error})"
        ) from error
