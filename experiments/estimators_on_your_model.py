"""Compare gradient estimators on your own Pyro program.

Give model, guide and data as module:attribute, where the module is found from the present folder. Model and guide
are functions, or modules (a class is called without arguments); the data is a tuple of their arguments, or a
function that returns it. Estimators that do not fit the program are listed with the reason. Two examples:

uv run experiments/estimators_on_your_model.py                # a Gaussian mixture
uv run experiments/estimators_on_your_model.py --model experiments.programs.two_digits:Scene
--guide experiments.programs.two_digits:Inference --data experiments.programs.two_digits:data
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro

from vma_pyro import cli
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro.infer import ESTIMATORS, compare
from vma_pyro.infer.comparison.suggest import applicable
from vma_pyro.infer.engine.programs import Programs


@dataclass(frozen=True)
class ProgramConfig:
    """Compare gradient estimators on your own program."""

    model: str = "experiments.programs.mixture:Mixture"
    """The model, as module:attribute."""
    guide: str = "experiments.programs.mixture:Assignment"
    """The guide, as module:attribute."""
    data: str = "experiments.programs.mixture:data"
    """The arguments of both, as module:attribute."""
    out: Path = Path("runs/your_model")
    """Folder for estimators.json and estimators.md; files of these names in it are replaced."""
    evaluations: int = 4
    """Runs of the model per datapoint and gradient, the same for all estimators that can do with it."""
    draws: int = 200
    """Gradients of each estimator."""
    site: str | None = None
    """The discrete site whose values some estimators choose; default: the first one with finite support."""
    batch_plates: tuple[str, ...] = ("data",)
    """Plates whose elements are the datapoints; none: all data is one, as with a latent that all share."""
    estimators: tuple[str, ...] = ()
    """Names of estimators; default: all."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        cli.check_sizes(self, "evaluations", "draws")
        cli.check_seed(self)


def find_attribute(option: str, path: str) -> Any:
    """The attribute at module:attribute.

    Raises:
        ValueError: no such module or attribute.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{option}: expected module:attribute, got {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{option}: expected a module that can be imported, got {module!r} ({error})") from error
    except AttributeError as error:
        raise ValueError(f"{option}: expected an attribute of {module}, got {name!r}") from error


def load_program(option: str, path: str) -> Any:
    """Find a function or a module; a class is called."""
    found = find_attribute(option, path)
    found = found() if inspect.isclass(found) else found
    if not callable(found):
        raise ValueError(f"{option}: expected something to call, got {type(found).__name__} at {path}")
    return found


def load_arguments(path: str) -> tuple[Any, ...]:
    """Find the arguments of both programs."""
    found = find_attribute("data", path)
    found = found() if callable(found) else found
    if not isinstance(found, tuple):
        raise ValueError(f"data: expected a tuple of arguments, got {type(found).__name__} at {path}")
    return found


def main(config: ProgramConfig) -> None:
    """Compare the estimators, and write."""
    lock.take(config.out, argument="out")
    pyro.enable_validation(True)  # these programs are new
    sys.path.insert(0, str(Path.cwd()))
    model, guide = load_program("model", config.model), load_program("guide", config.guide)
    args = load_arguments(config.data)
    estimators, left_out = applicable(
        Programs(model, guide, args),
        config.evaluations,
        site=config.site,
        batch_plates=config.batch_plates,
        names=config.estimators or tuple(ESTIMATORS),
    )
    table = compare(
        model,
        guide,
        args,
        estimators=estimators,
        draws=config.draws,
        batch_plates=config.batch_plates,
        seed=config.seed,
    )
    page = f"# Estimators on {config.model}\n\n{table.to_markdown()}"
    if left_out:
        page += "\nLeft out:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in left_out.items())
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "estimators.json", table.to_json())
    write_text(config.out / "estimators.md", page)
    print(page)


if __name__ == "__main__":
    cli.run(main, ProgramConfig, __doc__)
