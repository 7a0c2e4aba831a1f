"""Pixels that are independent given z and m: binary, and grey from 0 to 1."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vma_pyro.likelihoods.interface import Distribution, Likelihood
from vma_pyro.memory.checks import check_binary, check_ink, check_shares


class BernoulliPixels(Likelihood):
    r"""Binary pixels, independent given z and m, as in the paper.

    .. math:: p(x \mid z, m) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(d_i(z, m)))
    """

    def forward(self, decoded: Float[Tensor, "*batch C height width"]) -> Distribution:
        """See `Likelihood.forward`."""
        return dist.Bernoulli(logits=decoded).to_event(3)

    def check(self, name: str, images: Tensor) -> None:
        """Refuse values other than 0 and 1."""
        advice = "; binarise, use a model with another likelihood, or say learned=True if they are learned"
        check_binary(name, images, advice="" if name == "x" else advice, inversion=False)

    def warn(self, name: str, images: Tensor) -> None:
        """Name images most of which is ink, as if ink and paper had changed places."""
        check_ink(name, images)


class ContinuousBernoulli(Likelihood):
    r"""Grey pixels from 0 to 1, independent given z and m (Loaiza-Ganem and Cunningham 2019).

    .. math:: p(x \mid z, m) = \prod_i C(\lambda_i) \, \lambda_i^{x_i} (1 - \lambda_i)^{1 - x_i}, \qquad
              \lambda = \sigma(d(z, m))

    The usual cross-entropy, with the constant C that makes a density of it. Its NLL may be below 0. The mean of x
    is not :math:`\lambda` but goes up and down with it.
    """

    def forward(self, decoded: Float[Tensor, "*batch C height width"]) -> Distribution:
        """See `Likelihood.forward`."""
        return StableContinuousBernoulli(logits=decoded).to_event(3)

    def check(self, name: str, images: Tensor) -> None:
        """Refuse values outside 0 to 1."""
        check_shares(name, images)


class StableContinuousBernoulli(dist.ContinuousBernoulli):
    r"""The distribution of Pyro, by its logit l alone: :math:`\lambda` is clamped, at black and white pixels.

    With :math:`\log C = \log (l / \tanh(l/2))`, and a series of it near l = 0.
    """

    NEAR = 0.2  # |l| below which the series are exact to 1e-12
    FLAT = 1e-3  # |l| below which draws are of a straight line

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of values [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - F.softplus(self.logits) + self._log_norm()

    def _log_norm(self) -> Tensor:
        near = self.logits.abs() < self.NEAR
        y = (torch.where(near, self.logits, 0.0) / 2) ** 2
        series = math.log(2) + torch.log1p(y / 3 - y**2 / 45 + 2 * y**3 / 945 - y**4 / 4725)
        size = torch.where(near, 1.0, self.logits.abs())
        log_tanh = torch.log(-torch.expm1(-size)) - torch.log1p(torch.exp(-size))
        return torch.where(near, series, size.log() - log_tanh)

    @property
    def mean(self) -> Tensor:
        """E x = 1 / (1 - exp(-l)) - 1 / l."""
        near = self.logits.abs() < self.NEAR
        y = torch.where(near, self.logits, 0.0)
        series = 0.5 + y / 12 - y**3 / 720 + y**5 / 30240 - y**7 / 1209600
        far = torch.where(near, 1.0, self.logits)
        return torch.where(near, series, -1 / torch.expm1(-far) - 1 / far)

    @property
    def variance(self) -> Tensor:
        """Var x = 1 / l^2 - exp(-l) / (1 - exp(-l))^2, the derivative of the mean."""
        near = self.logits.abs() < 2 * self.NEAR  # the difference of the two loses more digits
        y = torch.where(near, self.logits, 0.0) ** 2
        series = 1 / 12 - y / 240 + y**2 / 6048 - y**3 / 172800 + y**4 / 5322240
        far = torch.where(near, 1.0, self.logits.abs())
        return torch.where(near, series, far**-2 - torch.exp(-far) / torch.expm1(-far) ** 2)

    @property
    def stddev(self) -> Tensor:
        """The square root of the variance."""
        return self.variance.sqrt()

    def entropy(self) -> Tensor:
        """-E log p(x), nats, from the mean distance to the nearer of black and white."""
        size = self.logits.abs()
        far = torch.where(size == 0, 1.0, size)
        distance = torch.where(size == 0, 0.0, 1 + far * torch.exp(-far) / torch.expm1(-far))  # |l| E of it
        return distance + torch.log1p(torch.exp(-size)) - self._log_norm()

    def cdf(self, value: Tensor) -> Tensor:
        """P(x <= value), by that of a dark pixel."""
        if self._validate_args:
            self._validate_sample(value)
        light = self.logits > 0
        share = self._of_dark(torch.where(light, 1 - value, value))
        return torch.where(light, 1 - share, share)

    def icdf(self, value: Tensor) -> Tensor:
        """The level below which the share `value` lies, by that of a dark pixel."""
        light = self.logits > 0
        level = self._level_of_dark(torch.where(light, 1 - value, value))
        return torch.where(light, 1 - level, level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw by the inverse of the distribution function of a dark pixel (l < 0), or of its negative."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        dark = self._level_of_dark(u)
        drawn = torch.where(self.logits < 0, dark, 1 - dark)
        # In l and not in its size, which has no derivative at 0, where decoders start.
        flat = torch.where(self.logits < 0, u, 1 - u) + self.logits * u * (1 - u) / 2
        return torch.where(self.logits.abs() < self.FLAT, flat, drawn).clamp(0, 1)

    def _of_dark(self, value: Tensor) -> Tensor:
        """The distribution function for -|l|."""
        size = self.logits.abs()
        flat = size < self.FLAT**2
        far = torch.where(flat, 1.0, size)
        return torch.where(
            flat, value + size * value * (1 - value) / 2, torch.expm1(-far * value) / torch.expm1(-far)
        )

    def _level_of_dark(self, u: Tensor) -> Tensor:
        """The inverse of it."""
        size = self.logits.abs()
        flat = size < self.FLAT**2
        far = torch.where(flat, 1.0, size)
        return torch.where(flat, u - size * u * (1 - u) / 2, -torch.log1p(u * torch.expm1(-far)) / far)
