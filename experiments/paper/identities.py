"""Identities that no figure may violate, checked in the results of the experiments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from paper.verdicts import Results, readable
from vma_pyro.evaluation import Mean

WITHIN = 3.0  # standard errors that an identity may be off by, as all figures are estimates
ROUNDING = 1e-3  # nats


class Identity(NamedTuple):
    """Holds something that must be true.

    Attributes:
        what: in words.
        source: name of the results.
        checked: number of figures.
        violations: those that violate it, in words.
    """

    what: str
    source: str
    checked: int
    violations: tuple[str, ...]


def identities(results: Results) -> list[Identity]:
    """Check all that the results at hand allow; a figure that is not a number violates its identity."""
    found = []
    for name, content in results.items():
        with readable(name):
            found += [_kl_below_log_memory(content, name)]
            found += [check(content, name) for of, check in IDENTITIES if of == name.removesuffix("_causal")]
    return [identity for identity in found if identity.checked]


def _kl_below_log_memory(content: dict[str, Any], source: str) -> Identity:
    """Compare both wherever they stand side by side, whatever the experiment: p(a) is uniform in all of these."""
    rows = [row for row in _tables(content) if "log_memory" in row and isinstance(row.get("kl_address"), dict)]
    found = [
        f"KL(a) = {Mean.read(row['kl_address'])} with log |M| = {row['log_memory']:.3f}"
        for row in rows
        if not Mean.read(row["kl_address"]).mean <= row["log_memory"] + ROUNDING
    ]
    return Identity("KL(a) <= log |M|", source, len(rows), tuple(found))


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all dictionaries in a value, at any depth."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(item)


def _classes_cost_log_c(content: dict[str, Any], source: str) -> Identity:
    rows = [r for r in content["rows"] if r["model"] == "hard" and r["classes"] > 1 and "excess" in r]
    found = [
        f"{r['test']}, C = {r['classes']}, {r['shots']} of each: {over} above"
        for r in rows
        if not (over := Mean.read(r["excess"])).mean <= WITHIN * over.se
    ]
    return Identity("L(C) - L(1) <= log C", source, len(rows), tuple(found))


def _classes_cost_log_c_in_table(content: dict[str, Any], source: str) -> Identity:
    cells = {
        (r["classes"], r["shots"]): Mean.read(r["nll"])
        for r in content["rows"]
        if (r["counting"], r["address"]) == ("shots per class", "sampled")
    }
    rows = [(c, shots) for c, shots in cells if c > 1 and (1, shots) in cells]
    found = []
    for c, shots in rows:
        many, one = cells[c, shots], cells[1, shots]
        if not many.mean - one.mean <= math.log(c) + WITHIN * math.hypot(many.se, one.se):
            found.append(f"C = {c}, {shots} shots: {many} against {one}")
    return Identity("L(C) - L(1) <= log C", source, len(rows), tuple(found))


def _more_samples_are_tighter(content: dict[str, Any], source: str) -> Identity:
    rows = [r for r in content["rows"] if r["address"] == "sampled"]
    found = [
        f"C = {r['classes']}, {r['shots']} shots: {gain} nats gained"
        for r in rows
        if not (gain := Mean.read(r["gain"])).mean >= -WITHIN * gain.se
    ]
    return Identity("The bound with many samples >= that with few", source, len(rows), tuple(found))


def _one_entry_costs_nothing(content: dict[str, Any], source: str) -> Identity:
    cells = {r["address"]: Mean.read(r["nll"]) for r in content["rows"] if r["classes"] * r["shots"] == 1}
    if not {"sampled", "exact"} <= cells.keys():
        return Identity("At |M| = 1 the address costs nothing", source, 0, ())
    one, other = cells["sampled"], cells["exact"]
    same = abs(one.mean - other.mean) <= WITHIN * math.hypot(one.se, other.se)
    found = () if same else (f"sampled {one}, exact {other}",)
    return Identity("At |M| = 1 the address costs nothing", source, 1, found)


def _memory_is_used(content: dict[str, Any], source: str) -> Identity:
    own = {(r["model"], r["classes"], r["shots"]): Mean.read(r["nll"]) for r in content["nll"]}
    without = next(value for (model, *_), value in own.items() if model == "no memory")
    most = max(shots for model, _, shots in own if model == "hard")
    best = own["hard", 1, most]
    clearly = without.mean - best.mean > WITHIN * math.hypot(without.se, best.se)
    found = () if clearly else (f"{best} with {most} examples in memory, {without} without",)
    return Identity("A memory model is clearly below the memoryless one", source, 1, found)


IDENTITIES: tuple[tuple[str, Callable[[dict[str, Any], str], Identity]], ...] = (
    ("memory_size", _classes_cost_log_c),
    ("table1", _classes_cost_log_c_in_table),
    ("table1", _more_samples_are_tighter),
    ("table1", _one_entry_costs_nothing),
    ("soft_attention", _memory_is_used),
)
