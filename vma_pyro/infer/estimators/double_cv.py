"""Double control variates: what the gradient of f at the other particles says of the values drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite
from vma_pyro.infer.estimators.baselines import leave_one_out_sum
from vma_pyro.infer.estimators.relaxed import Relax, SoftBernoulli, SoftCategorical
from vma_pyro.infer.estimators.straight_through import drawn


@final
class DoubleCV(Estimator):
    r"""The evidence lower bound with a control variate that is linear in the one-hot values x.

    .. math::
        \nabla_\phi = \frac1K \sum_k \Big[ f_k + \beta_k - \tfrac1{K-1} \sum_{l \ne k} (f_l + \beta_l) \Big] h_k
                      - \frac\alpha K \sum_k J(q_k) \, \bar g_k, \qquad
        \beta_k = \alpha \, h_k \cdot \bar g_k, \qquad \bar g_k = \tfrac1{K-1} \sum_{l \ne k} g_l

    with h = x - q, g the gradient of f = log w with respect to x, J(q) = diag(q) - q q' (Titsias & Shi 2022,
    equation 12, for bits; the categorical form is ours). Unbiased for any alpha, and whatever a value between the
    discrete ones means to the program. Alpha is the one with the least variance in earlier draws. With common
    noise (`noise="common"`) g of one particle says more of the others.

    The program must be able to read one-hot values [..., S] in the place of integers, see `RelaxedELBO`; bits stay
    as they are.

    Args:
        num_particles: K, at least 2.
        decay: of the running means behind alpha, which move in training mode only.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: a discrete site that is not `Categorical`, `OneHotCategorical` or `Bernoulli`; none at all.
    """

    objective = "elbo"
    unbiased = True
    min_particles = 2
    _knows_rules = True

    def __init__(self, num_particles: int = 2, *, decay: float = 0.99, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {decay}")
        if not self.vectorize_particles:
            raise ValueError("vectorize_particles: expected True for DoubleCV, got False")
        self.slope = Slope(decay)

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return the running means."""
        return {"slope": self.slope}

    def _estimate(self, programs: Programs) -> Estimate:
        harden = Harden(None, 1.0, lambda log_q, _: drawn(log_q))
        with torch.enable_grad():  # for g, also where the loss alone is wanted
            with harden.reading("DoubleCV"):
                nesting = self._nesting(programs)
                particles = self._draw(programs.under(harden), self.num_particles, nesting=nesting)
            log_w = particles.log_weights  # [K, B]
            particles.open_gates(torch.ones_like(log_w))
            parts = [_Part.of(score, log_w) for score in particles.scores]
        f = log_w.detach()
        alpha = self.slope.value().to(f)
        # The score, whose mean is zero, takes the derivative of -log q(a) out of log w.
        surrogate = (finite(log_w) + particles.score).mean(0).sum()
        beta = sum((part.beta for part in parts), torch.zeros_like(f))  # [K, B], for alpha = 1
        plain, control = compared(f), compared(beta)
        for part in parts:
            surrogate = surrogate + ((plain + alpha * control) * part.log_q).mean(0).sum()
            surrogate = surrogate - alpha * (part.mean_g * part.q).sum((-2, -1)).mean(0).sum()
        self.slope.remember([part.gradients(plain, control) for part in parts])
        return Estimate(f.mean(0), surrogate, particles.scale)


class Slope(nn.Module):
    """alpha, the ratio of two running means: of the products of the two parts of a gradient A + alpha B."""

    product: Tensor
    square: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("product", torch.tensor(0.0))
        self.register_buffer("square", torch.tensor(0.0))

    def value(self) -> Tensor:
        """Compute -E AB / E BB of earlier draws; 0 before the first."""
        return torch.where(self.square > 0, -self.product / self.square.clamp_min(1e-30), 0.0)

    @torch.no_grad()
    def remember(self, gradients: list[tuple[Tensor, Tensor]]) -> None:
        """Take the parts of the gradients of a draw into the means."""
        if self.training and gradients:
            product = torch.stack([(a * b).sum() for a, b in gradients]).sum()
            square = torch.stack([(b * b).sum() for _, b in gradients]).sum()
            product, square = product.to(self.product), square.to(self.square)
            known = torch.isfinite(product) & torch.isfinite(square)  # else nothing is learned from this draw
            weight = torch.where(self.square == 0, 1.0, 1 - self.decay)
            self.product.lerp_(torch.where(known, product, self.product), weight)
            self.square.lerp_(torch.where(known, square, self.square), weight)


class _Part(NamedTuple):
    """What one site has to do with the control variate: D elements of V values; a bit has the value "on" alone."""

    log_q: Float[Tensor, "K B"]
    q: Float[Tensor, "K B D V"]  # differentiable
    h: Float[Tensor, "K B D V"]
    mean_g: Float[Tensor, "K B D V"]  # over the other particles

    @classmethod
    def of(cls, score: SiteScore, log_w: Float[Tensor, "K B"]) -> _Part:
        """Differentiate log w with respect to the values of a site."""
        value, (fn, _) = score.site["value"], elementary(score.site["fn"])
        g = gradient_at(log_w, value)
        q = fn.logits.sigmoid() if isinstance(fn, HardBernoulli) else fn.logits.exp()
        size = 1 if isinstance(fn, HardBernoulli) else fn.logits.shape[-1]
        x, q, g = (by_value(score, t, size) for t in (value.detach(), q.expand(value.shape), g))
        return cls(score.log_prob, q, x - q.detach(), leave_one_out_sum(g) / (len(g) - 1))

    @property
    def beta(self) -> Float[Tensor, "K B"]:
        """The control variate for alpha = 1."""
        return (self.h * self.mean_g).sum((-2, -1))

    def gradients(self, plain: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient for the logits [B, D, V] without the control variate, and that of it alone."""
        q = self.q.detach()
        expected = q * (self.mean_g - (q * self.mean_g).sum(-1, keepdim=True))  # J(q) mean g
        of_f, of_beta = ((part[..., None, None] * self.h) for part in (plain, control))
        return of_f.mean(0), (of_beta - expected).mean(0)


class HardCategorical(SoftCategorical):
    """One-hot values of a categorical distribution, which remember what is differentiated with respect to them."""

    has_rsample = False

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw one-hot values, the start of a graph."""
        return self.rsample(sample_shape).detach().requires_grad_()


class HardBernoulli(SoftBernoulli):
    """Bits that remember what is differentiated with respect to them."""

    has_rsample = False

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw bits, the start of a graph."""
        on = self.logits.detach().sigmoid().expand(*sample_shape, *self.logits.shape)
        return (torch.rand_like(on) < on).to(on).requires_grad_()


class Harden(Relax):
    """Let discrete sites have values that can be differentiated with respect to."""

    categorical, bits = HardCategorical, HardBernoulli


def compared(f: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """Compare each particle with the mean of the others."""
    return finite(f - leave_one_out_sum(f) / (len(f) - 1))


def gradient_at(log_w: Float[Tensor, "K B"], value: Tensor) -> Tensor:
    """Differentiate log w with respect to values; 0 where it does not depend on them."""
    g = None
    if log_w.requires_grad:
        (g,) = torch.autograd.grad(log_w.sum(), value, retain_graph=True, allow_unused=True)
    return torch.zeros_like(value) if g is None else finite(g)


def by_value(score: SiteScore, values: Tensor, size: int) -> Float[Tensor, "K B D V"]:
    """Gather values [K, plates, inner, V] of a site by datapoint; those of bits have no dimension V."""
    inner = elementary(score.site["fn"])[1] + (0 if size == 1 else 1)
    return score.layout.by_element(score.site, values, inner).unflatten(-1, (-1, size))
