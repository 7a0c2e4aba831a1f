"""8-bit images, grey or in colour: a mixture of logistic distributions, cut into 256 levels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vma_pyro._system.noise import own_noise
from vma_pyro._system.whole import check_whole
from vma_pyro.likelihoods.interface import Distribution, Likelihood
from vma_pyro.memory.checks import check_levels

LOG_SCALES = (-7.0, 7.0)  # of a logistic over [-1, 1]: from a ninth of a level on, to flat
START = -3.0  # of log scales: six of 256 levels, around pixels that are copied
# The decoder's maps start at zero and move a little in an update. Scales have to fall by several units, and one
# weight to stand out from the others: with this factor that takes tens of updates, not hundreds.
PACE = 3.0
MEAN_OF = 64  # draws behind E[x | z, m], whose standard error is at most 0.06 then


class DiscretizedLogistics(Likelihood):
    r"""8-bit grey and colour: a mixture of K logistics per pixel (Salimans et al. 2017, section 2.1).

    .. math:: p(x_i \mid z, m) = \sum_k \pi_{ik} \prod_c \left[
              \sigma\!\left(\tfrac{x_{ic} + \delta/2 - \mu_{ikc}}{s_{ikc}}\right) -
              \sigma\!\left(\tfrac{x_{ic} - \delta/2 - \mu_{ikc}}{s_{ikc}}\right) \right]

    on the levels from -1 to 1 with distance :math:`\delta`, the outermost of which take the rest of the line. The
    mean of a colour depends on the colours before it in the pixel, linearly: :math:`\mu_{ikc} = \mu^0_{ic} +
    \mu_{ikc} + \sum_{b < c} \alpha_{ikbc} x_{ib}`; :math:`\mu^0` are the first C channels of the decoder.

    Images have values k / 255, from 0 to 1. The NLL is one of levels, not a density: 0 nats or more, and
    `bits_per_dim` says it per number.

    Args:
        mixtures: K.
        levels: of a colour, 256 in images of 8 bits.
    """

    copies = True

    def __init__(self, mixtures: int = 5, *, levels: int = 256) -> None:
        super().__init__()
        check_whole("mixtures", mixtures)
        check_whole("levels", levels, least=2)
        self.mixtures, self.levels = mixtures, levels

    def maps(self, colours: int) -> int:
        """See `Likelihood.maps`: of each component a weight, C means, C scales and C (C - 1) / 2 slopes."""
        return self.mixtures * (1 + 2 * colours + colours * (colours - 1) // 2)

    def forward(self, decoded: Float[Tensor, "*batch C height width"]) -> Distribution:
        """See `Likelihood.forward`."""
        numbers = decoded.shape[-3]
        colours = next((c for c in range(1, numbers) if c + self.maps(c) == numbers), None)
        if colours is None:
            raise ValueError(
                f"decoded: expected {1 + self.maps(1)} channels for grey or {3 + self.maps(3)} for three colours, "
                f"got {numbers}"
            )
        return LogisticImages(decoded, colours=colours, mixtures=self.mixtures, levels=self.levels)

    def check(self, name: str, images: Tensor) -> None:
        """Refuse values that are no levels."""
        check_levels(name, images, self.levels)


def bits_per_dim(nats: float, image_shape: tuple[int, int, int]) -> float:
    """Say an NLL in nats per image [C, height, width] in bits per number, as papers on 8-bit images do."""
    return nats / math.prod(image_shape) / math.log(2)


class LogisticImages(dist.TorchDistribution):
    """The distribution of images that `DiscretizedLogistics` gives: event shape [C, height, width].

    Args:
        decoded: [..., B, C + numbers, height, width].
        colours: C.
        mixtures: K.
        levels: of a colour.
        validate_args: refuse values that are no levels; by default as Pyro validates.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.independent(dist.constraints.unit_interval, 3)

    def __init__(
        self, decoded: Tensor, *, colours: int, mixtures: int, levels: int, validate_args: bool | None = None
    ) -> None:
        self.decoded, self.colours, self.mixtures, self.levels = decoded, colours, mixtures, levels
        shape = torch.Size((colours, *decoded.shape[-2:]))
        super().__init__(decoded.shape[:-3], shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogisticImages:
        """The same for more images, without a copy."""
        sizes = {"colours": self.colours, "mixtures": self.mixtures, "levels": self.levels}
        decoded = self.decoded.expand(*batch_shape, *self.decoded.shape[-3:])
        return LogisticImages(decoded, **sizes, validate_args=self._validate_args)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights [..., K, height, width]; means, log scales [..., K, C, ...]; slopes [..., K, pairs, ...]."""
        k, c = self.mixtures, self.colours
        sizes = [c, k, k * c, k * c, k * (c * (c - 1) // 2)]
        base, weights, means, scales, slopes = self.decoded.split(sizes, -3)
        # At the start the components stand apart, or all would do the same for ever.
        apart = torch.linspace(-0.8, 0.8, k + 2, dtype=base.dtype, device=base.device)[1:-1].reshape(k, 1, 1, 1)
        means = 2 * base.sigmoid().unsqueeze(-4) - 1 + means.unflatten(-3, (k, c)) + apart
        log_scales = (START + PACE * scales.unflatten(-3, (k, c))).clamp(*LOG_SCALES)
        slopes = (PACE * slopes.unflatten(-3, (k, c * (c - 1) // 2))).tanh()
        return (PACE * weights).log_softmax(-3), means, log_scales, slopes

    def log_prob(self, value: Float[Tensor, "*images C height width"]) -> Float[Tensor, "*batch"]:
        """Log probability of images of levels, nats."""
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"x: expected images {list(self.event_shape)}, got values of shape {list(value.shape)}"
            )
        if self._validate_args:
            check_levels("x", value, self.levels)
        log_weights, means, log_scales, slopes = self._parts()
        x = 2 * value.unsqueeze(-4) - 1  # [..., 1, C, height, width]
        if self.colours > 1:
            shifts = [self._shift(c, slopes, x) for c in range(self.colours)]
            means = means + torch.stack(torch.broadcast_tensors(*shifts), -3)
        levels = log_level(x, means, log_scales, half=1 / (self.levels - 1))
        return (log_weights + levels.sum(-3)).logsumexp(-3).sum((-2, -1))

    def _shift(self, c: int, slopes: Tensor, x: Tensor) -> Tensor:
        """What the colours before it in its pixel add to the mean of colour c; nothing for the first."""
        first = c * (c - 1) // 2  # of its slopes, pair by pair
        shift = x.new_zeros(())
        for b in range(c):
            shift = shift + slopes[..., first + b, :, :] * x[..., b, :, :]
        return shift

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw a component for each pixel, and its colours one after the other."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            log_weights, means, log_scales, slopes = self._parts()
            noise = torch.rand(*shape, *log_weights.shape[-3:], dtype=means.dtype, device=means.device)
            gumbel = -(-noise.clamp_min(1e-20).log()).clamp_min(1e-20).log()
            chosen = F.one_hot((log_weights + gumbel).argmax(-3), self.mixtures).movedim(-1, -3).to(means.dtype)
            mean, scale, slope = (
                (part * chosen.unsqueeze(-3)).sum(-4) for part in (means, log_scales.exp(), slopes)
            )
            u = torch.rand(*shape, *self.event_shape, dtype=means.dtype, device=means.device).clamp(1e-6, 1 - 1e-6)
            steps = self.levels - 1
            drawn = torch.zeros_like(u)  # levels 0 .. steps
            for c in range(self.colours):
                centre = mean[..., c, :, :] + self._shift(c, slope, 2 * drawn / steps - 1)
                real = centre + scale[..., c, :, :] * u[..., c, :, :].logit()
                drawn[..., c, :, :] = ((real.clamp(-1, 1) + 1) / 2 * steps).round()
            return drawn / steps

    @property
    def mean(self) -> Tensor:
        """E x, the mean of 64 draws that are the same at every call: there is no simple formula for it."""
        with own_noise(seed=0):
            return self.sample((MEAN_OF,)).mean(0)


def log_level(x: Tensor, mean: Tensor, log_scale: Tensor, *, half: float) -> Tensor:
    r"""Log probability of the level at x, of a logistic.

    .. math:: \log(\sigma(a) - \sigma(b)) = \log \sigma(a) + \log \sigma(-b) + \log(1 - e^{b - a}), \qquad
              a, b = (x \pm \tfrac\delta2 - \mu) / s

    which is exact at any distance from the mean. The outermost levels have no b, or no a.

    Args:
        x: levels from -1 to 1.
        mean, log_scale: of the logistic.
        half: half the distance between levels.
    """
    inverse = (-log_scale).exp()
    upper, lower = (x - mean + half) * inverse, (x - mean - half) * inverse
    first, last = x < -1 + half, x > 1 - half
    inner = torch.log(-torch.expm1(-2 * half * inverse))
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + inner
    return torch.where(first, F.logsigmoid(upper), torch.where(last, F.logsigmoid(-lower), inside))
