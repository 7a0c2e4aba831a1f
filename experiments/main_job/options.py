"""The options of the main job, with defaults that suit the data on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.train import TrainOptions
from main_job.scores import Amounts
from vma_pyro import cli, models
from vma_pyro.training import TrainConfig


class Preset(NamedTuple):
    """Sizes that suit the data on two CPU cores."""

    width: float
    classes: int
    shots: int
    minutes: float
    eval_images: int
    eval_samples: int
    eval_queries: int = 1000


PRESETS = {
    "glyphs": Preset(0.25, 16, 2, 1.1, 2000, 20),
    "omniglot": Preset(0.33, 12, 3, 60.0, 500, 1000),
    "omniglot-45": Preset(0.33, 12, 3, 60.0, 500, 1000),
}


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot generation with a variational memory."""

    data: Literal["glyphs", "omniglot", "omniglot-45"] | None = None
    """Procedural glyphs, made on the spot, or Omniglot: the canonical split, or 45 alphabets against 5 (as figures
    3 to 5 of the paper). Default: what the loaded checkpoint was trained on, else glyphs."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder, where
    Omniglot is downloaded to."""
    out: Path = Path("runs/few_shot")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    load: Path | None = None
    """Report and generate from this checkpoint, or the one that the word pretrained stands for, without
    training."""
    code: str | None = None
    """A Python file or module of your own, whose classes the checkpoint to load may name. It is run: give only
    code that you trust."""
    init: Path | None = None
    """Train on from the weights of this checkpoint, or of the one that the word pretrained stands for: a new cycle
    of the learning rate, a new optimizer."""
    resume: bool = False
    """Go on with the run in the folder `out`."""
    width: float | None = None
    """Factor on the paper's 48 and 64 maps per convolution; default 0.25 for glyphs, 0.33 for Omniglot."""
    latent_dim: int = 64
    """Dimension of z."""
    refinement: int | None = None
    """Maps of a second look of q(z | x, m) at x, m and what the first guess decodes to; 0 for none. Default: what
    the checkpoint to start from has, else 0."""
    likelihood: Literal["bernoulli", "causal"] | None = None
    """p(x | z, m): independent pixels as in the paper, or pixels that also see their neighbourhood above and to the
    left. Default: that of the checkpoint to load or to start from, else the paper's."""
    context_dropout: float | None = None
    """Share of the training images that are scored without their neighbourhood."""
    train_only: Literal["all", "refinement"] = "all"
    """Train everything, or only what `refinement` adds."""
    classes: int | None = None
    """Classes in the training memory; default 16 for glyphs, 12 for Omniglot. The paper has 8 classes x 4
    examples; on held-out alphabets more examples of fewer classes serve many shots, fewer of more classes one."""
    shots: int | None = None
    """Examples of each class in the training memory; default 2 for glyphs, 3 for Omniglot."""
    queries: int = 32
    """Images per update."""
    particles: int = 4
    """K of the multi-sample bound."""
    estimator: str = "vimco"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`: vimco, vimco+dreg, loo, rloo, distinct, ..."""
    augment: Literal["none", "rotations", "rotations+flips"] = "rotations"
    """Turned training images as classes of their own; the test classes are never turned."""
    shared_memory: bool = True
    """One memory for all images of an update (fast), or one for each, as in the paper."""
    memoryless: bool = True
    """Also train the memoryless model, for as many updates, to know what the memory brings."""
    train: TrainOptions = field(default_factory=TrainConfig)
    """Training. Without a budget: 1.1 minutes for glyphs, 60 for Omniglot, for each of the two models."""
    eval_images: int | None = None
    """Test images per likelihood; default 2000 for glyphs, 500 for Omniglot, 150 for the pretrained model."""
    eval_samples: int | None = None
    """Importance samples per test image; default 20 for glyphs, 1000 for Omniglot, 10 for the pretrained model."""
    eval_queries: int | None = None
    """Test images per classification task; default 1000, 500 for the pretrained model."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `track`)."""
    tiny: bool = False
    """Run everything once, as small as it gets, to see that it works."""

    def small(self) -> FewShotConfig:
        """Make the job tiny."""
        steps = replace(self.train, updates=2, minutes=None, log_every=1, validate_every=2, validation_samples=1)
        sizes: dict[str, Any] = {"width": 0.1, "latent_dim": 4, "classes": 3, "shots": 2, "queries": 4}
        tests: dict[str, Any] = {"eval_images": 4, "eval_samples": 2, "eval_queries": 10}
        return replace(self, **sizes, **tests, train=steps, tiny=False)

    def resolved(self) -> FewShotConfig:
        """Fill in the defaults of the data, or of the loaded checkpoint."""
        if self.tiny:
            return self.small().resolved()
        source = self.load or self.init
        loaded = {} if source is None else models.facts_of(source)
        data = self.data or loaded.get("data", "glyphs")
        if data not in PRESETS:
            option = "load" if self.load else "init"
            raise ValueError(f"{option}: expected a model of {', '.join(PRESETS)}, got one of {data}")
        preset = PRESETS[data]
        if self.load == models.PRETRAINED:  # a look at it
            preset = preset._replace(eval_images=150, eval_samples=10, eval_queries=500)
        unlimited = self.train.updates is None and self.train.minutes is None
        return replace(
            self,
            data=data,
            width=loaded.get("width", preset.width if self.width is None else self.width),
            latent_dim=loaded.get("latent_dim", self.latent_dim),
            likelihood=self.likelihood or loaded.get("likelihood", "bernoulli"),
            refinement=loaded.get("refinement", 0) if self.refinement is None else self.refinement,
            classes=preset.classes if self.classes is None else self.classes,
            shots=preset.shots if self.shots is None else self.shots,
            eval_images=preset.eval_images if self.eval_images is None else self.eval_images,
            eval_samples=preset.eval_samples if self.eval_samples is None else self.eval_samples,
            eval_queries=preset.eval_queries if self.eval_queries is None else self.eval_queries,
            train=replace(self.train, minutes=preset.minutes) if unlimited else self.train,
        )

    def amounts(self) -> Amounts:
        """Say how much to measure."""
        assert self.eval_images is not None  # resolved
        assert self.eval_samples is not None
        assert self.eval_queries is not None
        return Amounts(images=self.eval_images, samples=self.eval_samples, queries=self.eval_queries)

    def architecture(self, *, memory: bool) -> dict[str, Any]:
        """Give plain values from which `models.build` makes the model with memory, or the one without."""
        program = "memory" if memory else "memoryless"
        sizes = {"width": self.width, "latent_dim": self.latent_dim}
        refined = {"refinement": self.refinement} if self.refinement else {}
        pixels: dict[str, Any] = {} if self.likelihood == "bernoulli" else {"likelihood": self.likelihood}
        if self.context_dropout is not None:
            pixels["context_dropout"] = self.context_dropout
        return {"networks": "conv", **sizes, **refined, **pixels, "program": program}

    def check(self) -> None:
        """Refuse sizes that mean nothing, by the names of their options."""
        sizes = (
            "latent_dim",
            "classes",
            "shots",
            "queries",
            "particles",
            "eval_images",
            "eval_samples",
            "eval_queries",
        )
        cli.check_sizes(self, *sizes)
        cli.check_sizes(self, "refinement", least=0)
        cli.check_factor(self, "width")
