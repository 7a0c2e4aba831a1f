"""Programs of other fields, each trained by every estimator, and judged by what a perfect guide would reach.

A program (`experiments/programs`, by the interface there) has a guide and a reference log evidence. Each estimator
trains the guide from the same first weights, with the same number of runs of the model: one whose gradient takes
more of them takes fewer updates. Then the single-sample bound (ELBO) and bounds with more samples are drawn from
what it has learned. An estimator that cannot run the program is listed with its one line. Interrupted, it goes on
with --resume.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import copy
import importlib
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch

from common import folder, kept, results
from common.evidence_page import UNTRAINED, EvidencePage
from vma_pyro import cli
from vma_pyro.evaluation import Mean
from vma_pyro.infer import ESTIMATORS, evaluations_of, log_weights, make, matched
from vma_pyro.infer.comparison.subject import find_parameters
from vma_pyro.infer.engine.first_look import PlateNesting
from vma_pyro.infer.engine.programs import Programs

if TYPE_CHECKING:  # another `programs` may be on the path of who imports this
    from programs.interface import Field

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("phylogenetics", "phylogenetics:five_taxa", "switching", "global_mixture")
PROGRAMS = (*SMALL, "air", "semi_supervised", "topics")
ERRORS = (ValueError, RuntimeError, NotImplementedError, IndexError, TypeError)


@dataclass(frozen=True)
class FieldsConfig:
    """Train the programs of other fields by every estimator."""

    programs: tuple[str, ...] = PROGRAMS
    """Modules of experiments/programs that have a function `field`; or module:function."""
    estimators: tuple[str, ...] = ()
    """Names of estimators; default: all."""
    runs: int = 2400
    """Runs of the model per datapoint in each training, the same for all estimators."""
    evaluations: int = 8
    """Of these in one update, for all estimators that can do with it."""
    lr: float = 0.1
    """Adam's learning rate at the start, from where it falls to 0 in a straight line."""
    few: int = 10
    """Samples of the bound with few."""
    samples: int = 1000
    """Samples of the tightest bound."""
    repeats: int = 20
    """Draws of the tightest bound."""
    seed: int = 0
    """Of the data, of first weights and of all draws."""
    out: Path = Path("runs/programs")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    resume: bool = False
    """Go on with an interrupted run in the folder."""
    tiny: bool = False
    """Seconds instead of minutes, to see that everything runs."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        cli.check_sizes(self, "runs", "evaluations", "few")
        cli.check_sizes(self, "repeats", least=2)
        cli.check_factor(self, "lr")
        cli.check_seed(self)
        if self.samples < self.few or self.samples % self.few:
            raise ValueError(f"samples: expected a multiple of few, {self.few}, got {self.samples}")
        unknown = sorted(set(self.estimators) - set(ESTIMATORS))
        if unknown:
            raise ValueError(f"estimators: expected names from {', '.join(ESTIMATORS)}, got {', '.join(unknown)}")

    def resolved(self) -> FieldsConfig:
        """Fill in the tiny sizes, if they are wanted."""
        return replace(self, runs=16, few=2, samples=4, repeats=3) if self.tiny else self


def load_field(path: str, seed: int) -> Field:
    """Find a program by its module, or module:function.

    Raises:
        ValueError: no such module or function.
    """
    module, _, function = path.partition(":")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    try:
        found = getattr(importlib.import_module(f"experiments.programs.{module}"), function or "field")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            "programs: expected a module of experiments/programs with a function that makes a Field, got "
            f"{path!r} ({error})"
        ) from error
    made: Field = found(seed=seed)
    return made


def build(name: str, field: Field, nesting: int, config: FieldsConfig) -> Any:
    """Make an estimator within the budget of an update; those that take one site get the first."""
    several = name == "exact" or make(name, max(2, config.evaluations)).objective == "relaxed"
    site: Any = field.site if several or isinstance(field.site, str) else field.site[0]

    def of_particles(name: str, k: int) -> Any:
        return make(name, k, site=site, max_plate_nesting=nesting, batch_plates=field.batch_plates)

    programs = field.model, field.guide, field.args
    try:
        return matched([name], of_particles, config.evaluations, *programs)[name]
    except ERRORS:  # of a single particle, the last that was tried; that of two says what the program lacks
        evaluations_of(of_particles(name, 2), *programs)
        raise


def train(elbo: Any, field: Field, updates: int, config: FieldsConfig) -> float:
    """Train the guide, and the model where it learns along; returns the seconds."""

    def known(*args: Any) -> None:
        """A model without parameters."""

    learns = Programs(field.model if field.learns_model else known, field.guide, field.args)
    parameters = [*find_parameters(learns)]
    parameters += [p for part in elbo.learned_parts().values() for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / updates)
    start = time.perf_counter()
    for update in range(updates):
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(field.model, field.guide, *field.args)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at update {update + 1}")
        loss.backward()
        optimizer.step()
        falling.step()
    return time.perf_counter() - start


@torch.no_grad()
def judge(field: Field, nesting: int, config: FieldsConfig) -> dict[str, Any]:
    """Draw bounds of the log evidence with one, few and many samples, nats summed over the datapoints."""
    torch.manual_seed(config.seed + 1)
    drawn: dict[str, list[torch.Tensor]] = defaultdict(list)
    for _ in range(config.repeats):
        log_w = log_weights(
            field.model,
            field.guide,
            field.args,
            num_particles=config.samples,
            batch_plates=field.batch_plates,
            max_plate_nesting=nesting,
        ).double()
        grouped = {"elbo": log_w[:, None], "few": log_w.unflatten(0, (-1, config.few)), "bound": log_w[None]}
        for name, groups in grouped.items():  # [repeats, samples, B]
            drawn[name].append((groups.logsumexp(1) - math.log(groups.shape[1])).sum(-1))
    return {name: Mean.of(torch.cat(values))._asdict() for name, values in drawn.items()}


def try_out(item: tuple[str, str], field: Field, config: FieldsConfig) -> dict[str, Any]:
    """Train by an estimator, the first of the item, and judge; or the line in which it refuses."""
    name = item[0]
    nesting = PlateNesting()(Programs(field.model, field.guide, field.args))
    pyro.clear_param_store()
    model, guide = copy.deepcopy((field.model, field.guide))
    own = field._replace(model=model, guide=guide)
    torch.manual_seed(config.seed)
    if name == UNTRAINED:
        return {"estimator": name, **judge(own, nesting, config)}
    try:
        with pyro.validation_enabled():  # of the first draws; training goes on without, as it does elsewhere
            elbo = build(name, own, nesting, config)
        cost = evaluations_of(elbo, own.model, own.guide, own.args)
        updates = max(1, round(config.runs / cost))
        facts = {"objective": elbo.objective, "evaluations": cost, "updates": updates}
        seconds = train(elbo, own, updates, config)
        return {"estimator": name, **facts, "seconds": seconds, **judge(own, nesting, config)}
    except (*ERRORS, FloatingPointError) as error:
        kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
        return {"estimator": name, "refused": kind + str(error).splitlines()[0]}


def main(config: FieldsConfig) -> None:
    """Train all, judge all, and write."""
    config = config.resolved()
    start = time.monotonic()
    folder.begin(config, load=None)
    fields = {path: load_field(path, config.seed) for path in config.programs}  # all, before any training
    programs: list[dict[str, Any]] = []
    for path, field in fields.items():
        items = [(name, path.replace(":", ".")) for name in (UNTRAINED, *(config.estimators or ESTIMATORS))]
        rows = kept.each(config, items, partial(try_out, field=field, config=config), unit="estimator")
        evidence = {"mean": field.evidence, "se": field.error}
        about = (sys.modules[type(field.model).__module__].__doc__ or path).splitlines()[0]
        programs.append({"program": path, "about": about, "evidence": evidence, "how": field.how, "rows": rows})
    head = results.header(config, since=start, device=torch.device("cpu"), training={})
    about = (
        f"Each guide is trained from the same first weights with {config.runs:,} runs of the model per datapoint, "
        f"{config.evaluations} an update where the estimator can do with it, by Adam at {config.lr:g} falling to "
        f"0; seed {config.seed}. Then {config.repeats} times {config.samples:,} samples: their ELBO, bounds of "
        f"{config.few} and of {config.samples:,}, in nats summed over the data, ± one standard error over the "
        "draws. A gap is the reference minus the bound; that of the ELBO shows the guide's family as well. Rows "
        f"go by the gap of {config.few} samples. Seconds are of the updates alone, by the clock."
    )
    page = EvidencePage(config.few, config.samples)
    parts = [about, page.summary(programs)]
    parts += [
        f"So many samples may make up for an untrained guide of a small program: there the gap of {config.few} "
        "samples and that of the ELBO tell estimators apart.",
        *(part for program in programs for part in page.section(program)),
    ]
    results.write(config.out, {**head, "programs": programs}, "Programs of other fields", parts)


if __name__ == "__main__":
    cli.run(main, FieldsConfig, __doc__)
