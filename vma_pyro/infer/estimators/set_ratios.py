r"""What a set of distinct values is worth.

Draw k values one after the other without replacement from q, and forget the order: a set U. Below, m(T) is the
probability that is left once the values in T are taken, and

    F(T) = sum over s in U minus T of q_s / m(T) F(T + s),        F(U) = 1,

is the probability that the next draws are exactly the rest of U. So F({}) is the probability of the set, and
R(U, s) = F({s}) / F({}) makes sum over s in U of q_s R(U, s) f(s) an unbiased estimate of E f: the ratios are the
leave-one-out ratios of Kool et al. 2020, equation 9. Sums run over 2^k subsets, in log space.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MOST_VALUES = 12  # 2^k subsets


class SetRatios:
    """F of all subsets of a drawn set.

    Args:
        log_q: of the values in the set [k, *B].
        log_rest: of the probability outside the set [*B]; -inf if there is none.
    """

    def __init__(self, log_q: Float[Tensor, " k *B"], log_rest: Float[Tensor, " *B"]) -> None:
        self.log_q, self.k = log_q, len(log_q)
        masses = self._masses(log_rest)
        self.log_f = [torch.zeros_like(log_rest)] * (1 << self.k)
        for subset in range((1 << self.k) - 2, -1, -1):
            terms = [log_q[s] + self.log_f[subset | 1 << s] for s in range(self.k) if not subset >> s & 1]
            # Once no probability is left, any order of the rest will do.
            left = masses[subset] > -torch.inf
            masses[subset] = torch.where(left, masses[subset], 0.0)
            self.log_f[subset] = torch.where(left, torch.stack(terms).logsumexp(0) - masses[subset], 0.0)

    def _masses(self, log_rest: Tensor) -> list[Tensor]:
        """log m of every subset, as a sum of what is left: 1 - sum would cancel where q is nearly one value."""
        masses = [log_rest] * (1 << self.k)
        for subset in range((1 << self.k) - 2, -1, -1):
            s = (~subset & (subset + 1)).bit_length() - 1  # the lowest value that is not taken
            masses[subset] = torch.logaddexp(masses[subset | 1 << s], self.log_q[s])
        return masses

    @property
    def log_set(self) -> Float[Tensor, " *B"]:
        """log of the probability of the set."""
        return self.log_f[0]

    def log_weights(self) -> Float[Tensor, " k *B"]:
        """log q_s R(U, s): how much each value counts; their sum over s is one."""
        return torch.stack([self.log_q[s] + self.log_f[1 << s] for s in range(self.k)]) - self.log_f[0]

    def expectation_given_first(self, f: Float[Tensor, " k *B"]) -> Float[Tensor, " k *B"]:
        """Estimates of E f, for each s unbiased given that s was drawn first (Kool et al. 2020, eq. 12)."""
        rows = []
        for s in range(self.k):
            row = self.log_q[s].exp() * f[s]
            for other in range(self.k):
                if other != s:
                    ratio = self.log_f[1 << s | 1 << other] - self.log_f[1 << s]
                    row = row + (self.log_q[other] + ratio).exp() * f[other]
            rows.append(row)
        return torch.stack(rows)
