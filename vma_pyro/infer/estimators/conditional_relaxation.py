r"""A discrete value x as the largest of perturbed logits z, and z once more given x.

.. math::
    z = \log q + g, \quad g \sim \mathrm{Gumbel}, \qquad x = \mathrm{onehot} \arg\max_s z_s
    \\
    \tilde z_x = -\log e_x, \qquad
    \tilde z_s = -\log\big( e_s / q_s + e_x \big), \quad s \ne x, \qquad e_s \sim \mathrm{Exp}(1)

has the distribution of z given x (Tucker et al. 2017, with v = exp(-e)). A bit has the difference of
its two, :math:`z = \phi + \mathrm{logit}(u)`, and given b, with l logistic,

.. math:: \tilde z = (2b - 1) \, \mathrm{softplus}\big( l - \log q(1 - b) \big)

Both are functions of the logits: z with g held fixed, z given x with e (or l) and x held fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vma_pyro.infer.engine.coupled import positions
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.particles import Particles, SiteScore
from vma_pyro.infer.estimators.straight_through import moved


@dataclass(frozen=True)
class RelaxedSite:
    """The elements of a site, relaxed: a bit has one logit, a value of S has S in the last dimension.

    Attributes:
        score: of the site.
        logits: of what it was drawn from, [K, *elements] or [K, *elements, S]; differentiable in the guide.
        phi: the same numbers, the start of a graph.
        x: the drawn bits, or one-hot values.
        h: the gradient of log q(x) in them, x - q.
        z: perturbed logits, a function of phi.
        z_given: perturbed logits given x, with other noise; a function of phi.
        possible: where q is not zero; elsewhere z is 0, and weights are.
    """

    score: SiteScore
    logits: Tensor
    phi: Tensor
    x: Tensor
    h: Tensor
    z: Tensor
    z_given: Tensor
    possible: Tensor

    @classmethod
    def of(cls, score: SiteScore) -> RelaxedSite:
        """Draw z and z given x for the values of a site."""
        fn, _ = elementary(score.site["fn"])
        of_kind = relaxed_bits if is_bits(fn) else relaxed_values
        possible = fn.logits > -math.inf
        phi = torch.where(possible, fn.logits, -math.inf).detach().requires_grad_()
        value = score.site["value"].detach()
        x = value if is_bits(fn) else one_hot(positions(fn, value), phi)
        h, z, z_given = of_kind(phi, x, *log_exponential(phi, 2 * (1 + is_bits(fn))))
        return cls(score, torch.where(possible, fn.logits, 0.0), phi, x, h, z, z_given, possible)

    def weights(self, temperature: Float[Tensor, ""]) -> Tensor:
        """Compute softmax(z / tau), and behind it that of z given x, [2K, *elements]."""
        both = torch.cat([self.z, self.z_given]) / temperature
        if is_bits(elementary(self.score.site["fn"])[0]):
            return both.sigmoid()
        return torch.where(torch.cat([self.possible] * 2), both, -math.inf).softmax(-1)

    def corners(self) -> list[Tensor]:
        """Draw the corners of a path of weights [K, *elements]: x, another possible value, and two in between."""
        with torch.no_grad():
            x = self.x
            if is_bits(elementary(self.score.site["fn"])[0]):
                free = self.phi.isfinite()
                return [x, *(torch.where(free, w, x) for w in (1 - x, torch.rand_like(x), torch.rand_like(x)))]
            others = torch.where(self.possible & (x == 0), torch.rand_like(x), -1.0)
            other = torch.where((others > -1).any(-1, keepdim=True), one_hot(others.argmax(-1), x), x)
            inside = (torch.empty_like(x).exponential_() * self.possible for _ in range(2))
            return [x, other, *(w / w.sum(-1, keepdim=True).clamp_min(1e-30) for w in inside)]

    def features(self) -> tuple[Float[Tensor, "K B F"], Float[Tensor, "K B F"]]:
        """Gather z, and z given x, by datapoint."""
        return self._by_datapoint(self.z), self._by_datapoint(self.z_given)

    def spread(self, values: Float[Tensor, "K B"], particles: Particles) -> Tensor:
        """Bring what belongs to datapoints to the dimensions of phi."""
        of_site = self.score.layout.spread(self.score.site, values.reshape(-1, *particles.batch_shape))
        return of_site.reshape(of_site.shape + (1,) * (self.phi.dim() - of_site.dim()))

    def summed(self, values: Tensor) -> Float[Tensor, "K B"]:
        """Sum what belongs to its elements, and to their values, by datapoint."""
        return self._by_datapoint(values).sum(-1)

    def _by_datapoint(self, values: Tensor) -> Float[Tensor, "K B F"]:
        fn, inner = elementary(self.score.site["fn"])
        return self.score.layout.by_element(self.score.site, values, inner + (not is_bits(fn)))


def is_bits(fn: object) -> bool:
    """Tell whether a distribution of elements has one logit for each."""
    return isinstance(fn, torch.distributions.Bernoulli)


def one_hot(position: Int64[Tensor, "*E"], like: Float[Tensor, "*E S"]) -> Float[Tensor, "*E S"]:
    """Write positions as one-hot values; the function of torch would look at them, for which a GPU must wait."""
    return torch.zeros_like(like, requires_grad=False).scatter(-1, position[..., None], 1.0)


def relaxed_values(
    phi: Float[Tensor, "*E S"], x: Float[Tensor, "*E S"], *noise: Float[Tensor, "*E S"]
) -> tuple[Float[Tensor, "*E S"], Float[Tensor, "*E S"], Float[Tensor, "*E S"]]:
    """Compute x - q, z, and z given the one-hot x, from log e of two draws."""
    log_q = phi.log_softmax(-1)
    z, z_given = (value_given(log_q, x, log_e) for log_e in noise)
    return x - log_q.exp().detach(), moved(z, log_q), z_given


def relaxed_bits(
    phi: Float[Tensor, "*E"], b: Float[Tensor, "*E"], *noise: Float[Tensor, "*E"]
) -> tuple[Float[Tensor, "*E"], Float[Tensor, "*E"], Float[Tensor, "*E"]]:
    """Compute b - q, z, and z given the bit b, from log e of two draws for each of the two values."""
    z, z_given = (bit_given(phi, b, on - off) for on, off in (noise[:2], noise[2:]))
    return b - phi.sigmoid().detach(), moved(z, phi), z_given


def value_given(
    log_q: Float[Tensor, "*E S"], x: Float[Tensor, "*E S"], log_e: Float[Tensor, "*E S"]
) -> Float[Tensor, "*E S"]:
    """Compute the perturbed log q of which x is the largest; 0 for values that are impossible."""
    possible = log_q > -math.inf
    largest = (log_e * x).sum(-1, keepdim=True)
    others = -torch.logaddexp(log_e - torch.where(possible, log_q, 0.0), largest)
    return torch.where(possible, torch.where(x > 0, -largest, others), 0.0)


def bit_given(
    phi: Float[Tensor, "*E"], b: Float[Tensor, "*E"], logistic: Float[Tensor, "*E"]
) -> Float[Tensor, "*E"]:
    """Compute the perturbed logit whose sign is that of the bit."""
    sign = 2 * b - 1
    return sign * F.softplus(logistic - F.logsigmoid(-sign * phi))


def log_exponential(like: Float[Tensor, "*E"], number: int) -> Float[Tensor, " N *E"]:
    """Draw the logarithms of exponential variables."""
    e = torch.empty(number, *like.shape, dtype=like.dtype, device=like.device).exponential_()
    return e.clamp_min(torch.finfo(like.dtype).tiny).log()
