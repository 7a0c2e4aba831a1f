"""The options of the main job, with defaults that suit the data on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from common.train import TrainOptions
from main_job.scores import Amounts
from vma_pyro import cli, models
from vma_pyro.data import Split, labelled
from vma_pyro.data.episodes import most_queries
from vma_pyro.training import TrainConfig

Data = Literal[
    "glyphs",
    "omniglot",
    "omniglot-45",
    "omniglot-45-26",
    "folder",
    "emnist",
    "kmnist",
    "fashion",
    "cifar10",
    "svhn",
]
Pixels = Literal["bernoulli", "causal", "continuous-bernoulli", "logistics", "causal-logistics"]


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
    "omniglot-45-26": Preset(0.33, 12, 3, 60.0, 500, 1000),
    **{name: Preset(0.33, 8, 4, 30.0, 500, 50) for name in labelled.NAMES},
    "folder": Preset(0.33, 12, 3, 30.0, 500, 50),
}
# Colours and bits of images to the likelihoods that can score them.
FITTING = {
    (1, 1): ("bernoulli", "causal"),
    (1, 8): ("logistics", "causal-logistics", "continuous-bernoulli"),
    (3, 8): ("logistics", "causal-logistics"),
}
# Options that a checkpoint to load or to start from has a word on.
CONTEXT = tuple(f"context_{name}" for name in models.CONTEXT)
SHAPES = ("width", "latent_dim", "top_maps", "blocks", "refinement", "looks", "likelihood", *CONTEXT)
LATENT_DIM = 64  # of z, as in the paper
OWN = ("folder", *labelled.NAMES)  # whose classes and sizes are known when they are loaded


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot generation with a variational memory."""

    data: Data | None = None
    """Procedural glyphs, made on the spot; Omniglot: the canonical split, or 45 alphabets against 5 (as figures
    3 to 5 of the paper), also at 26 x 26 from the original drawings; a folder of your own images; or labelled
    images that torchvision downloads. Default: what the loaded checkpoint was trained on, else glyphs."""
    data_dir: Path | None = None
    """Folder of the data; default: the environment variable VMA_DATA, else a cache in the home folder, where data
    are downloaded to. With `folder` your images: PATH/class/*.png, PATH/group/class/*.png or PATH.npz."""
    mode: Literal["binary", "grey", "colour"] | None = None
    """Of your own images, and of those that torchvision downloads: ink on paper, or 8 bits. Default: that of the
    checkpoint to load or to start from, else binary for a folder."""
    size: int | None = None
    """Side in pixels that images are brought to; default: that of the checkpoint to load or to start from, else
    they stay as they are."""
    skip_unreadable: bool = False
    """Go on without files that cannot be read."""
    out: Path = Path("runs/few_shot")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    load: Path | None = None
    """Report and generate from this checkpoint, or one that a word stands for, without training: pretrained has
    the paper's likelihood, pretrained-causal draws sharp strokes."""
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
    top_maps: int | None = None
    """Maps at the top of the pyramid, which most weights look at; default: as many as below it."""
    blocks: int | None = None
    """Residual blocks at each size of maps below the images'; default 0."""
    latent_dim: int | None = None
    """Dimension of z; default 64."""
    refinement: int | None = None
    """Maps of a second look of q(z | x, m) at x, m and what the first guess decodes to; 0 for none. Default: what
    the checkpoint to start from has, else 0."""
    looks: int | None = None
    """How often that corrects it; default 1."""
    likelihood: Pixels | None = None
    """Likelihood p(x | z, m): bernoulli, independent binary pixels as in the paper; causal, binary pixels that
    also see their neighbourhood above and to the left; continuous-bernoulli, grey from 0 to 1; logistics and
    causal-logistics, 8 bits in grey or colour. Default: that of the checkpoint to load or to start from, else the
    paper's for glyphs and Omniglot, causal for other binary images, logistics for grey and colour."""
    context_radius: int | None = None
    """Rows above and columns beside it that a pixel sees with a causal likelihood; default 4."""
    context_hidden: int | None = None
    """Maps of a causal likelihood's neighbourhood; default 48."""
    context_layers: int | None = None
    """Layers of a causal likelihood's neighbourhood that see single pixels; default 2."""
    context_steps: tuple[int, ...] | None = None
    """With a causal likelihood pixels pass on what they know, to those so many pixels further, once for each
    number; by default they do not."""
    context_alone: float | None = None
    """Weight in training of what a causal likelihood says without the neighbourhood; default 0."""
    train_only: Literal["all", "refinement"] = "all"
    """Train everything, or only what `refinement` adds."""
    classes: int | None = None
    """Classes in the training memory; default 16 for glyphs, else 12, or all that there are. The paper has 8
    classes x 4 examples; on held-out alphabets more examples of fewer classes serve many shots, fewer of more
    classes one."""
    shots: int | None = None
    """Examples of each class in the training memory; default 2 for glyphs, 3 for Omniglot and a folder."""
    queries: int | None = None
    """Images per update; default 32, or all that the classes leave."""
    particles: int = 4
    """K of the multi-sample bound."""
    estimator: str = "vimco"
    """Gradient estimator, a name in `vma_pyro.infer.ESTIMATORS`: vimco, vimco+dreg, loo, rloo, distinct, ..."""
    augment: Literal["none", "rotations", "rotations+flips"] | None = None
    """Turned training images as classes of their own; the test classes are never turned. Default: rotations of
    glyphs and Omniglot."""
    blank: float = 0.0
    """Share of the updates whose memory is without ink: the model learns what an image costs without a memory, by
    which `worth.py` says in nats what one is worth."""
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
        sizes: dict[str, Any] = {"classes": 3, "shots": 2, "queries": 4}
        if self.load is None and self.init is None:  # whose networks are as they are
            sizes |= {"width": 0.1, "latent_dim": 4}
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
        if self.load in (models.PRETRAINED, models.CAUSAL):  # a look at it
            preset = preset._replace(eval_images=150, eval_samples=10, eval_queries=500)
        unlimited = self.train.updates is None and self.train.minutes is None
        if self.load is not None:
            for name in SHAPES:
                given, known = getattr(self, name), loaded.get(name)
                if given is not None and given != known:
                    raise ValueError(f"{name}: expected that of the file beside load, {known}, got {given}")
        mode = self.mode or loaded.get("mode", "binary" if data == "folder" else None)
        likelihood = self.likelihood or loaded.get("likelihood", None if data in OWN else "bernoulli")
        if likelihood != loaded.get("likelihood"):
            loaded = {name: value for name, value in loaded.items() if name not in CONTEXT}  # of another one
        loaded = {"width": preset.width, "latent_dim": LATENT_DIM} | loaded
        shapes = {
            name: loaded.get(name) if getattr(self, name) is None else getattr(self, name) for name in SHAPES
        }
        own = data in OWN
        return replace(
            self,
            data=data,
            mode=mode,
            size=loaded.get("size") if self.size is None else self.size,
            **shapes | {"likelihood": likelihood},
            augment=self.augment or ("none" if own else "rotations"),
            eval_images=preset.eval_images if self.eval_images is None else self.eval_images,
            eval_samples=preset.eval_samples if self.eval_samples is None else self.eval_samples,
            eval_queries=preset.eval_queries if self.eval_queries is None else self.eval_queries,
            train=replace(self.train, minutes=preset.minutes) if unlimited else self.train,
        )

    def preparation(self) -> dict[str, Any]:
        """How images of one's own, or of torchvision, are prepared; nothing for others, which are as they are."""
        given: dict[str, Any] = {"mode": self.mode, "size": self.size, "skip_unreadable": self.skip_unreadable}
        if self.data != "folder":
            del given["skip_unreadable"]
        return {name: value for name, value in given.items() if value}

    def fitted(self, data: Split) -> FewShotConfig:
        """Fill in what the data decide: no more classes, shots and queries than there are, and the likelihood."""
        preset = PRESETS[str(self.data)]
        counts = torch.as_tensor(data.train.counts)
        classes = min(preset.classes, len(counts)) if self.classes is None else self.classes
        shots = min(preset.shots, data.train.examples - 1) if self.shots is None else self.shots
        queries = min(32, most_queries(counts, classes, shots)) if self.queries is None else self.queries
        colours, bits = data.train.image_shape[0], data.train.bits
        pixels = self.likelihood or ("causal" if bits == 1 else "logistics")
        known = (colours, bits) not in FITTING or pixels in FITTING[colours, bits]
        if not known:
            raise ValueError(
                f"likelihood: expected one for images of {colours} colours and {bits} bits, "
                f"{' or '.join(FITTING[colours, bits])}, got {pixels}"
            )
        return replace(self, classes=classes, shots=shots, queries=queries, likelihood=pixels)

    def amounts(self) -> Amounts:
        """Say how much to measure."""
        assert self.eval_images is not None  # resolved
        assert self.eval_samples is not None
        assert self.eval_queries is not None
        return Amounts(images=self.eval_images, samples=self.eval_samples, queries=self.eval_queries)

    def architecture(self, image_shape: tuple[int, int, int], *, memory: bool) -> dict[str, Any]:
        """Give plain values from which `models.build` makes the model with memory, or the one without."""
        program = "memory" if memory else "memoryless"
        sizes: dict[str, Any] = {"width": self.width, "latent_dim": self.latent_dim}
        if image_shape != (1, 28, 28):
            sizes["image_shape"] = image_shape
        more = {name: getattr(self, name) for name in ("top_maps", "blocks", "refinement", "looks")}
        pixels: dict[str, Any] = {} if self.likelihood == "bernoulli" else {"likelihood": self.likelihood}
        context = {name: getattr(self, name) for name in CONTEXT}
        return {
            "networks": "conv",
            **sizes,
            **{name: value for name, value in more.items() if value},
            **pixels,
            **{name: value for name, value in context.items() if value is not None},
            "program": program,
        }

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
        for name in ("refinement", "blocks"):
            if getattr(self, name) is not None:
                cli.check_sizes(self, name, least=0)
        cli.check_factor(self, "width")
        if self.size is not None:
            cli.check_sizes(self, "size", least=8)
