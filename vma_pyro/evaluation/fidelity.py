"""Whether what a model generates from one example is of its class, and how much it varies, by a judge's eyes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from vma_pyro._system.double import in_double
from vma_pyro.evaluation.chunks import check
from vma_pyro.evaluation.classification import classify
from vma_pyro.evaluation.estimates import Mean, undisturbed
from vma_pyro.memory import Memory


class Diversity(NamedTuple):
    """How far images of a class spread in an embedding: root mean square distance from their mean, over classes.

    Attributes:
        generated: of images generated from one example of each class.
        real: of the other examples.
    """

    generated: Mean
    real: Mean

    @property
    def relative(self) -> float:
        """What is generated varies so many times as much as what is real."""
        return self.generated.mean / self.real.mean


class Fidelity(NamedTuple):
    """Shares of images that a judge finds to be of their class.

    Attributes:
        generated: of images generated from one example each.
        real: of the examples themselves, the most that can be asked for of a perfect copy.
    """

    generated: Mean
    real: Mean


def class_fidelity(
    model: Callable[..., Any],
    judge: Callable[..., Any],
    memory: Memory,
    x: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
) -> Fidelity:
    """Generate an image from each of x alone, and have a judge classify it among the entries of a memory.

    A likelihood that leaves nothing to z and m draws sharp strokes of no class, with a good NLL: this tells it.
    None of x is in the memory, so that the judge has not seen what an image was generated from.

    Args:
        model: a program of (memory, x) with a site `x`.
        judge: a guide with a site `address`, the same for all models that are compared; not the model's own, which
            was trained to find whatever that model makes.
        memory: with labels, for each image or shared by all.
        x: real images [B, C, height, width].
        labels: class of each within the memory, int64 [B].
        seed: of what is generated.

    Returns:
        Shares with standard errors over the B images.

    Raises:
        ValueError: a memory without labels.
    """
    check(memory, x)
    if labels.shape != (len(x),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected int64 [{len(x)}], got {labels.dtype} {list(labels.shape)}")
    if memory.labels is not None and not bool(torch.isin(labels, memory.labels).all()):
        raise ValueError("labels: expected classes that are in the memory, got others")
    with undisturbed(model, seed=seed):
        trace = poutine.trace(model).get_trace(Memory(x.unsqueeze(1)))
        made: Any = trace.nodes["x"]["value"]
    right = [classify(judge, memory, images).argmax(-1) == labels for images in (made.to(x.dtype), x)]
    return Fidelity(*(Mean.of(found.to(torch.float32)) for found in right))


def sample_diversity(
    model: Callable[..., Any], embed: Callable[[Tensor], Tensor], classes: Tensor, *, seed: int = 0
) -> Diversity:
    """Generate from the first example of each class as many images as there are others, and compare their spread.

    Copies of the example are all of its class, and are of no use: class fidelity is to be read with this beside it
    (Boutin et al. 2022, whose recognisability and diversity these are, but for the classifier and the embedding).

    Args:
        model: a program of (memory, x) with a site `x`.
        embed: from images [N, C, height, width] to [N, E], the same for all models that are compared.
        classes: real images of each class [classes, examples, C, height, width], three examples or more.
        seed: of what is generated.

    Raises:
        ValueError: fewer than three examples.
    """
    if classes.dim() != 5 or classes.shape[1] < 3 or not len(classes):
        raise ValueError(
            "classes: expected [1 or more classes, 3 or more examples, C, height, width], got "
            f"{list(classes.shape)}"
        )
    spreads: dict[str, list[Tensor]] = {"generated": [], "real": []}
    with undisturbed(model, embed, seed=seed):
        for images in classes:
            others = images[1:]
            entry = images[:1].expand(len(others), *images.shape[1:])
            trace = poutine.trace(model).get_trace(Memory(entry.unsqueeze(1)))
            made: Any = trace.nodes["x"]["value"]
            if len(made) != len(others):
                raise ValueError(
                    f"model: expected as many images at its site 'x' as there are memories, {len(others)}, got "
                    f"{len(made)}"
                )
            for name, found in (("generated", made.to(images.dtype)), ("real", others)):
                squares = in_double(embed(found)).var(0).sum()  # unbiased
                spreads[name].append(squares.sqrt())
    return Diversity(**{name: Mean.of(torch.stack(values)) for name, values in spreads.items()})
