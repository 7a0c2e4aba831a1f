"""Continuous relaxations of one discrete site, for programs that can read softly; biased."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.estimator import Estimate, Estimator, RunOptions
from vma_pyro.infer.engine.handlers import Message
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import log_mean_exp, normalised, weighted

RELAXED = (torch.distributions.Categorical, torch.distributions.OneHotCategorical)


class RelaxedELBO(Estimator):
    r"""The multi-sample bound with a categorical site replaced by weights over its values.

    .. math::
        y_k = \mathrm{softmax}\big((\log q + g_k) / \tau\big), \quad g \sim \mathrm{Gumbel}, \qquad
        \log q(y) := \sum_a y_a \log q_a

    (Jang et al. 2017; Maddison et al. 2017), and its gradient through y. With `straight_through` the program sees
    the one-hot value of the largest weight, and the gradient of y.

    **Biased, and no bound of log p(x)**: a program that reads softly is another program. The site's value becomes
    a float tensor [..., S] instead of an integer [...], which the program must be able to read, as `Memory.read`
    is. That of a `OneHotCategorical` keeps its shape.

    Args:
        num_particles: K.
        site: name of the site, a `Categorical` or `OneHotCategorical`.
        temperature: tau; lower is closer to the discrete program, and noisier. Default 0.5.
        straight_through: show the program hard values.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: temperature not above 0; no such categorical site; another site that is not reparameterised.
    """

    objective = "relaxed"
    unbiased = False

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str = "address",
        temperature: float = 0.5,
        straight_through: bool = False,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(num_particles, **options)
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self.site, self.temperature, self.straight_through = site, temperature, straight_through

    def _estimate(self, programs: Programs) -> Estimate:
        relax = _Relax(self.site, self.temperature, self.straight_through)
        particles = self._draw(programs.under(relax), self.num_particles)
        if not relax.met:
            raise ValueError(f"site '{self.site}': expected a categorical site in the guide, found none")
        for score in particles.scores:
            raise ValueError(
                f"site '{score.name}': expected a reparameterised site beside '{self.site}', got one that is not"
            )
        log_w = particles.log_weights
        surrogate = weighted(normalised(log_w), log_w).sum()
        return Estimate(log_mean_exp(log_w).detach(), surrogate, particles.scale)


class SoftCategorical(TorchDistribution):
    """Weights over the values of a categorical distribution [*batch, S]; see `RelaxedELBO`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, hard: bool) -> None:
        self.logits, self.temperature, self.hard = logits.log_softmax(-1), temperature, hard
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SoftCategorical:
        """Expand the weights to a larger batch."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return SoftCategorical(logits, self.temperature, self.hard)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw by the Gumbel-softmax trick."""
        return F.gumbel_softmax(self.logits.expand(*sample_shape, *self.logits.shape), self.temperature, self.hard)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute log q, linear in the weights; at one-hot values it is the categorical one.

        A value of probability zero counts nothing without weight (0 log 0 = 0, also in the gradient), and is
        impossible with weight.
        """
        impossible = self.logits == -torch.inf
        terms = value * torch.where(impossible, 0.0, self.logits)
        return torch.where(impossible & (value != 0), -torch.inf, terms).sum(-1)


class _Relax(Messenger):
    """Make a categorical site soft, in the model and in the guide."""

    def __init__(self, site: str, temperature: float, hard: bool) -> None:
        self.site, self.temperature, self.hard, self.met = site, temperature, hard, False

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] != self.site or msg["is_observed"]:
            return
        if not isinstance(msg["fn"], RELAXED):
            masked = isinstance(msg["fn"], MaskedDistribution)
            instead = "; put the mask around it with poutine.mask" if masked else ""
            raise ValueError(
                f"site '{self.site}': expected a Categorical or OneHotCategorical to relax, got "
                f"{type(msg['fn']).__name__}{instead}"
            )
        self.met = True
        msg["fn"] = SoftCategorical(msg["fn"].logits, self.temperature, self.hard)
