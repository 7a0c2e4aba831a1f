"""What sites ask for with `infer={"estimator": ...}`, and whether they get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger

from vma_pyro.infer.engine.pathwise import PathwiseRule
from vma_pyro.infer.engine.plates import sample_sites


class Options(Messenger):
    """Collects what sites of a program ask for, innermost: a replay overwrites the model's with the guide's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if "estimator" in msg["infer"]:
            self.found[msg["name"]] = msg["infer"]["estimator"]


def check_options(
    guide_trace: poutine.Trace, model_options: Mapping[str, Any], *, baselines: bool, rules: bool, what: str
) -> None:
    """What sites ask for is something that the estimator can serve.

    Args:
        guide_trace: of the guide.
        model_options: what sites of the model ask for, by name.
        baselines: whether sites may ask for score baselines.
        rules: whether they may ask for pathwise rules.
        what: the estimator's name.
    """
    for site in sample_sites(guide_trace):
        name, infer = site["name"], site["infer"]
        for key, value in infer.items():
            ours = isinstance(value, PathwiseRule) or hasattr(value, "min_particles")
            if ours and key != "estimator":
                raise ValueError(f"site '{name}': expected infer={{'estimator': ...}}, got the key {key!r}")
        if infer.get("baseline"):
            raise ValueError(
                f"site '{name}': expected no infer={{'baseline': ...}}, which Pyro's TraceGraph_ELBO reads, under "
                f"{what}; ask with infer={{'estimator': ...}}"
            )
        asked = infer.get("estimator")
        if asked is None:
            continue
        if isinstance(asked, PathwiseRule):
            if not rules:
                raise ValueError(
                    f"site '{name}': expected no pathwise rule of its own under {what}, got {name_of(asked)}"
                )
        elif isinstance(asked, str) or not callable(asked):
            raise ValueError(
                f"site '{name}': expected as its estimator a score baseline (vimco, loo, ...) or a pathwise rule "
                f"(iwae, dreg, stl), the object and not its name, got {asked!r}"
            )
        elif not baselines:
            raise ValueError(
                f"site '{name}': expected no score baseline of its own under {what}, got {name_of(asked)}"
            )
    for name, asked in model_options.items():
        at_guide: Any = guide_trace.nodes[name]["infer"] if name in guide_trace else {}
        if at_guide.get("estimator") is not asked:
            raise ValueError(
                f"site '{name}': expected its estimator at the guide's site, got {name_of(asked)} at the model's"
            )


def name_of(estimator: Any) -> str:
    """The name of a baseline or rule, for tables and errors."""
    return repr(getattr(estimator, "name", None) or getattr(estimator, "__name__", None) or estimator)
