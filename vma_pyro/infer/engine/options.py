"""Options of single sites: what they ask for with `infer={"estimator": ...}`, and whether they get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger

from vma_pyro.infer.engine.pathwise import PathwiseRule
from vma_pyro.infer.engine.plates import Site, sample_sites


class SiteOptions(Messenger):
    """Collects what sites of a program ask for, innermost: a replay overwrites the model's with the guide's."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if "estimator" in msg["infer"]:
            self.found[msg["name"]] = msg["infer"]["estimator"]


def check_site_options(
    guide_trace: poutine.Trace,
    model_options: Mapping[str, Any],
    *,
    baselines: bool,
    rules: bool,
    what: str,
    coupled: bool = False,
) -> None:
    """Refuse what sites ask for and the estimator `what` cannot serve: score `baselines`, pathwise `rules`.

    Where noise has `coupled` the particles of a bound, so are rules that take them for independent.
    What sites of the model ask for, `model_options` by name, must be asked for in the guide.
    """
    for site in sample_sites(guide_trace):
        _check_keys(site, what)
        asked = site["infer"].get("estimator")
        if asked is not None:
            served = rules if isinstance(asked, PathwiseRule) else baselines
            _check_asked(site["name"], asked, served=served, what=what)
            if coupled and isinstance(asked, PathwiseRule) and asked.detached:
                raise ValueError(
                    f"site '{site['name']}': expected iwae with common noise, as '{asked.name}' takes the "
                    f"particles for independent, got {asked.name}"
                )
    for name, asked in model_options.items():
        at_guide: Any = guide_trace.nodes[name]["infer"] if name in guide_trace else {}
        if at_guide.get("estimator") is not asked:
            raise ValueError(
                f"site '{name}': expected its estimator at the guide's site, got {shown(asked)} at the model's"
            )


def _check_keys(site: Site, what: str) -> None:
    """Refuse a baseline or rule under another key than "estimator"."""
    for key, value in site["infer"].items():
        ours = isinstance(value, PathwiseRule) or hasattr(value, "min_particles")
        if ours and key != "estimator":
            raise ValueError(f"site '{site['name']}': expected infer={{'estimator': ...}}, got the key {key!r}")
    if site["infer"].get("baseline"):
        raise ValueError(
            f"site '{site['name']}': expected no infer={{'baseline': ...}}, which Pyro's TraceGraph_ELBO reads, "
            f"under {what}; ask with infer={{'estimator': ...}}"
        )


def _check_asked(name: str, asked: Any, *, served: bool, what: str) -> None:
    """Refuse what is no baseline and no rule, or not served."""
    is_rule = isinstance(asked, PathwiseRule)
    if not is_rule and (isinstance(asked, str) or not callable(asked)):
        raise ValueError(
            f"site '{name}': expected as its estimator a score baseline (vimco, loo, ...) or a pathwise rule "
            f"(iwae, dreg, stl), the object and not its name, got {asked!r}"
        )
    if not served:
        kind = "pathwise rule" if is_rule else "score baseline"
        raise ValueError(f"site '{name}': expected no {kind} of its own under {what}, got {shown(asked)}")


def shown(estimator: Any) -> str:
    """Name a baseline or rule, for tables and errors."""
    return repr(getattr(estimator, "name", None) or getattr(estimator, "__name__", None) or estimator)
