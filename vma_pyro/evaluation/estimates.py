"""What all evaluations share: means with standard errors, and leaving everything as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from vma_pyro._system.double import in_double
from vma_pyro._system.noise import own_noise


class Mean(NamedTuple):
    """A mean over images.

    Attributes:
        mean: in the unit of the quantity (nats per image unless said otherwise).
        se: standard error of the mean over the images.
        n: number of images.
    """

    mean: float
    se: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """From one value per image, [n]."""
        values = in_double(values)
        n = values.numel()
        se = values.std().item() / math.sqrt(n) if n > 1 else math.nan
        return cls(values.mean().item(), se, n)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Mean:
        """From JSON, where null stands for NaN."""
        mean, se = (math.nan if content[name] is None else float(content[name]) for name in ("mean", "se"))
        return cls(mean, se, int(content["n"]))

    @classmethod
    def pooled(cls, parts: Sequence[Mean]) -> Mean:
        """One estimate from those of disjoint sets of images."""
        n = sum(part.n for part in parts)
        mean = sum(part.n * part.mean for part in parts) / n
        # The sum of squares about the common mean: within the parts, and between them.
        squares = sum(
            (part.n * (part.n - 1) * part.se**2 if part.n > 1 else 0.0) + part.n * (part.mean - mean) ** 2
            for part in parts
        )
        return cls(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan, n)

    def __str__(self) -> str:
        """Mean and standard error."""
        return f"{self.mean:.2f} ± {self.se:.2f}"


class TwoPhase(NamedTuple):
    """A costly figure per image from a cheap one that all images have and the costly one of the first few.

    Nearly all differences between images show in the cheap figure already, so that its mean over many images,
    corrected by the mean difference over few, has a far smaller standard error than the costly figure alone for
    the same work (the difference estimator of two-phase sampling; Cochran, Sampling Techniques, chapter 12).

    Attributes:
        cheap: [N], of images in random order.
        costly: [n], of the first n of them.
    """

    cheap: Tensor
    costly: Tensor

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> TwoPhase:
        """From JSON, as `plain` gives it; other items of it are left alone."""
        return cls(torch.tensor(content["cheap"]), torch.tensor(content["costly"]))

    def plain(self) -> dict[str, list[float]]:
        """For JSON."""
        return {"cheap": self.cheap.tolist(), "costly": self.costly.tolist()}

    def estimate(self) -> Mean:
        """Estimate the mean of the costly figure over all images."""
        everywhere, n = len(self.cheap), len(self.costly)
        difference = in_double(self.costly - self.cheap[:n])
        mean = in_double(self.cheap).mean() + difference.mean()
        if n < 2:
            return Mean(mean.item(), math.nan, everywhere)
        variance = in_double(self.costly).var() / everywhere + (1 / n - 1 / everywhere) * difference.var()
        return Mean(mean.item(), math.sqrt(variance.item()), everywhere)

    def gain(self) -> Mean:
        """Estimate how much the cheap figure is above the costly one, over the images that have both."""
        return Mean.of(self.cheap[: len(self.costly)] - self.costly)

    def minus(self, other: TwoPhase) -> TwoPhase:
        """The difference, paired by image."""
        return TwoPhase(self.cheap - other.cheap, self.costly - other.costly)


@contextmanager
def undisturbed(*modules: Any, seed: int) -> Iterator[None]:
    """No gradients, evaluation mode and an own random stream; all is restored on leaving."""
    roots = [module for module in modules if isinstance(module, nn.Module)]
    training = {module: module.training for root in roots for module in root.modules()}
    with own_noise(seed), torch.no_grad():
        for root in roots:
            root.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def log_sum(chunks: Iterable[Float[Tensor, "*any B"]]) -> Float[Tensor, " B"]:
    """log of the sum of exp over everything but the last dimension, in double precision."""
    parts = [in_double(chunk).flatten(0, -2).logsumexp(0) for chunk in chunks]
    return functools.reduce(torch.logaddexp, parts)


def distribution_at(trace: poutine.Trace, site: str) -> Any:
    """The distribution of a site; Pyro's types say no more than that it is callable."""
    return trace.nodes[site]["fn"]
