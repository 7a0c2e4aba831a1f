"""A distribution over very many addresses of which some are scored: the proposal of a large memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from vma_pyro._system.double import widest_float


class DefensiveCategorical(TorchDistribution):
    r"""A softmax over some candidates, and a uniform share over all addresses, so that none is impossible.

    .. math:: q(a) = (1 - \epsilon) \, \mathrm{softmax}_P(\text{logits})_a + \epsilon \, \frac{1}{S}

    where the first term is that of the P candidates alone: a defensive mixture (Hesterberg 1995). Log
    probabilities are exact for every address, so that importance weights are, whatever the candidates.

    Args:
        logits: of the candidates [..., B, P]; -inf rules one out of the first term.
        candidates: their addresses, sorted and distinct, int64 [P].
        size: S, number of addresses.
        share: epsilon, between 0 and 1.
        left_out: an address for each datapoint that has no probability at all, int64 [B]; the others share its
            part, and S - 1 stands in the place of S.

    Attributes:
        normalised: log probabilities of the candidates among themselves [..., B, P].

    Raises:
        ValueError: candidates that are not int64 or not one for each logit, a share outside of 0 to 1; where
            validation is on: candidates that are not sorted, none that is left, a logit of infinity, an address to
            leave out that there is not.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.independent(constraints.real, 1)}
    has_enumerate_support = True

    def __init__(
        self,
        logits: Tensor,
        candidates: Tensor,
        size: int,
        *,
        share: float,
        left_out: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if candidates.dim() != 1 or logits.shape[-1:] != candidates.shape:
            raise ValueError(
                f"candidates: expected {logits.shape[-1]} addresses, one for each logit, got shape "
                f"{list(candidates.shape)}"
            )
        if candidates.dtype != torch.int64 or not len(candidates):
            got = f"{len(candidates)} of {candidates.dtype}"
            raise ValueError(f"candidates: expected one or more of int64, got {got}")
        check_share(share)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if left_out is not None:
            logits = logits.masked_fill(candidates == left_out.unsqueeze(-1), -math.inf)
        self.logits, self.candidates, self.size, self.share, self.left_out = (
            logits,
            candidates,
            size,
            share,
            left_out,
        )
        self.normalised = logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], validate_args=validate_args)
        if self._validate_args:
            self._check()

    def _check(self) -> None:
        if (
            not bool((self.candidates.diff() > 0).all())
            or self.candidates[0] < 0
            or self.candidates[-1] >= self.size
        ):
            raise ValueError(f"candidates: expected sorted and distinct addresses from 0 to {self.size - 1}")
        if self.left_out is not None and not bool(((self.left_out >= 0) & (self.left_out < self.size)).all()):
            low, high = int(self.left_out.min()), int(self.left_out.max())
            raise ValueError(f"left_out: expected 0 to {self.size - 1}, got {low} to {high}")
        if bool((self.logits == math.inf).any()):
            raise ValueError("logits: expected finite values, or -inf for what is ruled out, got inf")
        if bool((self.logits == -math.inf).all(-1).any()):
            beside = "" if self.left_out is None else " beside the address that is left out"
            raise ValueError(f"candidates: expected one of a probability above 0{beside}, got none")

    @property
    def support(self) -> Any:
        """Addresses 0 to S - 1."""
        return constraints.integer_interval(0, self.size - 1)

    @property
    def log_share(self) -> float:
        """Log probability of an address by the uniform share alone."""
        return math.log(self.share / (self.size - (self.left_out is not None)))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log probability of addresses, of a shape that broadcasts with the batch's."""
        if self._validate_args:
            self._validate_sample(value)
        # Where each value is looked up stands in its own dimensions: of all S there are only S.
        at = torch.searchsorted(self.candidates, value.contiguous()).clamp_(max=len(self.candidates) - 1)
        found = self.candidates[at] == value
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        by_share = self.normalised.new_full((), self.log_share)
        mixed = torch.logaddexp(self.normalised + math.log1p(-self.share), by_share)  # of the candidates
        chosen = mixed.expand(*shape, -1).gather(-1, at.expand(shape).unsqueeze(-1)).squeeze(-1)
        log_q = torch.where(found, chosen, by_share)
        return log_q if self.left_out is None else log_q.masked_fill(value == self.left_out, -math.inf)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw from the candidates, or from all addresses."""
        shape, device = self._extended_shape(torch.Size(sample_shape)), self.logits.device
        n = self.logits.dim() - 1  # dimensions of the batch that the logits have
        each = shape[len(shape) - n :]
        # By the inverse of the distribution function: `multinomial` draws P numbers for each address.
        below = self.normalised.exp().cumsum(-1, dtype=widest_float(device)).expand(*each, -1).contiguous()
        total = below[..., -1:]
        u = torch.rand(shape.numel() // each.numel(), *each, dtype=below.dtype, device=device).movedim(0, -1)
        at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total))).contiguous()
        near = torch.searchsorted(below, at, right=True).movedim(-1, 0).reshape(shape)
        anywhere = torch.randint(self.size - (self.left_out is not None), shape, device=device)
        if self.left_out is not None:
            anywhere = anywhere + (anywhere >= self.left_out)  # over the one that is left out
        return torch.where(torch.rand(shape, device=device) < self.share, anywhere, self.candidates[near])

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All addresses [S, 1, ..., 1], or [S, *batch]; those left out too, as each datapoint has its own."""
        values = torch.arange(self.size, device=self.logits.device)
        values = values.reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DefensiveCategorical:
        """The same distribution for a larger batch."""
        new = self._get_checked_instance(DefensiveCategorical, _instance)
        for name in ("logits", "candidates", "size", "share", "left_out", "normalised"):
            setattr(new, name, getattr(self, name))  # they broadcast
        super(DefensiveCategorical, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new


def check_share(share: float) -> None:
    """Refuse a uniform share that leaves addresses impossible, or scores useless."""
    if not 0 < share < 1:
        raise ValueError(f"share: expected between 0 and 1, as no address may be impossible, got {share}")
