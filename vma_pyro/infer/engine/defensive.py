"""Defensive proposals: a discrete site is drawn from a mixture of q and a uniform distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.handlers import Message, check_finite_support, is_open


class Defended(TorchDistribution):
    """A defensive mixture, (1 - share) q + share * uniform, over the values that q does not rule out."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, guide: Any, share: float) -> None:
        self.guide, self.share = guide, share
        # A value without any probability, such as padding of a memory, is not proposed.
        self.allowed = guide.log_prob(whole_support(guide)).detach() > -math.inf  # [S, *batch]
        self.number = self.allowed.sum(0)
        super().__init__(guide.batch_shape, guide.event_shape, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw from q, or from the uniform distribution."""
        values = whole_support(self.guide)
        pick = torch.randint(len(values), self.batch_shape, device=values.device)
        u = torch.rand(self.batch_shape, device=values.device)
        lucky = u < self.share
        # A value that q rules out gives way to another; u / share is uniform where u < share.
        number = self.number.expand(self.batch_shape)
        rank = (u / max(self.share, 1e-9) * number).long().minimum(number - 1)
        allowed = self.allowed.expand(-1, *self.batch_shape)
        order = allowed.int().argsort(dim=0, descending=True, stable=True)
        pick = torch.where(allowed.gather(0, pick[None])[0], pick, order.gather(0, rank[None])[0])
        uniform = values.reshape(len(values), *self.event_shape)[pick]  # [*batch, *event]
        lucky = lucky.reshape(lucky.shape + (1,) * len(self.event_shape))
        return torch.where(lucky, uniform, self.guide.sample())

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log probability under the mixture."""
        log_q = self.guide.log_prob(value) + math.log(1 - self.share)
        possible = log_q > -math.inf
        log_uniform = math.log(self.share) - self.number.log().to(log_q.dtype)
        # The gradient of a sum of two zeros would be NaN.
        return torch.where(possible, torch.logaddexp(torch.where(possible, log_q, 0.0), log_uniform), -math.inf)


class Defensive(Messenger):
    """Draw the discrete sites from `Defended`; a site without a finite support is refused."""

    def __init__(self, share: float) -> None:
        self.share = share

    def _pyro_sample(self, msg: Message) -> None:
        if is_open(msg) and not msg["fn"].has_rsample:
            check_finite_support(msg, " for a defensive proposal")
            msg["fn"] = Defended(msg["fn"], self.share)
