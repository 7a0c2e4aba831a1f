"""A trained model that is tested: the options of every such experiment, and loading it with its test classes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from common.protocols import Samples
from common.train import loaded_facts
from vma_pyro import cli, models
from vma_pyro.data import ImageClasses, split_of
from vma_pyro.models import Pair
from vma_pyro.training import device_of_name


@dataclass(frozen=True)
class TestConfig:
    """Options of every experiment that tests a trained model."""

    load: Path = models.PRETRAINED
    """Checkpoint of the model, or the word pretrained."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder."""
    out: Path = Path("runs/test")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    samples: Annotated[Samples, tyro.conf.OmitArgPrefixes] = field(default_factory=Samples)
    """Importance samples."""
    seed: int = 0
    """Seed of targets and memories."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the networks' layers: 32 bits, or bfloat16, which makes a model of its own of them, by a
    hundredth of a nat or so another (and every bound a bound of that)."""
    accelerator: str = "auto"
    """Where to run: cpu, cuda, mps (an Apple GPU), or auto, the first of cuda, mps and cpu that there is."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing, those of each experiment among them."""
        sizes = (
            "classes",
            "shots",
            "all_classes",
            "all_shots",
            "examples",
            "images",
            "ways",
            "likelihood_images",
            "diverse",
        )
        cli.check_sizes(self, *(name for name in (*sizes, "draws") if hasattr(self, name)))
        cli.check_seed(self)

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """In which everything is measured."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")


class Subject(NamedTuple):
    """A trained model to be tested.

    Attributes:
        pair: model and guide, on the device.
        facts: what its file says of it: the data, the architecture; and where it was.
        test: classes that it has never seen.
        device: to test it on.
    """

    pair: Pair
    facts: dict[str, Any]
    test: ImageClasses
    device: torch.device


def load_subject(config: TestConfig) -> Subject:
    """Load the model and its test classes.

    Raises:
        ValueError, OSError: no such model or data, a damaged file.
    """
    device = device_of_name(config.accelerator)
    pair = models.on(device, models.load(config.load, program="memory"))
    facts = loaded_facts(config.load)
    test = split_of(facts, config.data_dir).test
    return Subject(pair, facts, test, device)
