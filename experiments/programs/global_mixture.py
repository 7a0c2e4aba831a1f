r"""A Bayesian Gaussian mixture: its weights and means are latents that all points share.

.. math::
    w \sim \text{Dirichlet}(\alpha), \qquad \mu_k \sim N(m_k, t^2), \qquad a_i \sim \text{Categorical}(w), \qquad
    x_i \sim N(\mu_{a_i}, s^2)

So the whole data set is one datapoint (`batch_plates=()`). Given all assignments everything is conjugate: the
weights integrate to a Dirichlet-multinomial, each mean to the density of correlated Gaussian points, and the
evidence is a sum over all S^N assignments. The prior means differ, so that no component is another one's double:
a mixture whose components may be exchanged has S! equal modes, of which a guide such as this finds one.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from .interface import Field

FLOAT = torch.float64
POINTS = 8
ALPHA = torch.tensor([2.0, 1.5, 1.0], dtype=FLOAT)
CENTRES = torch.tensor([-2.0, 0.0, 2.0], dtype=FLOAT)  # m
AROUND, WITHIN = 1.0, 0.7  # t and s


class Mixture(nn.Module):
    """p(w) p(means) p(assignments | w) p(x | assignments, means)."""

    def forward(self, x: Tensor) -> Tensor:
        """Points x [N]; returns them."""
        w = pyro.sample("w", dist.Dirichlet(ALPHA))
        means = pyro.sample("means", dist.Normal(CENTRES, AROUND).to_event(1))
        with pyro.plate("points", len(x)):
            a = pyro.sample("assignment", dist.Categorical(w))
            weights = a if a.is_floating_point() else F.one_hot(a, len(CENTRES))  # a relaxed value is weights
            found: Tensor = pyro.sample("x", dist.Normal((weights * means).sum(-1), WITHIN), obs=x)
        return found


class Globals(nn.Module):
    r"""q(w) q(means) prod_i q(a_i | w, means).

    q(a_i) is the softmax of a table plus c_i times the log joint of the component and the point; with c_i = 1 and
    no table it is the posterior of a_i given the rest. It begins uniform.
    """

    def __init__(self, points: int) -> None:
        super().__init__()
        self.log_concentration = nn.Parameter(ALPHA.log())
        self.loc = nn.Parameter(CENTRES.clone())
        self.log_scale = nn.Parameter(torch.zeros(len(CENTRES), dtype=FLOAT))
        self.table = nn.Parameter(torch.zeros(points, len(CENTRES), dtype=FLOAT))
        self.trust = nn.Parameter(torch.zeros(points, 1, dtype=FLOAT))  # c

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        w = pyro.sample("w", dist.Dirichlet(self.log_concentration.exp()))
        means = pyro.sample("means", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
        joint = w.log() + dist.Normal(means, WITHIN).log_prob(x[:, None])  # [K, N, S]
        with pyro.plate("points", len(x)):
            pyro.sample("assignment", dist.Categorical(logits=self.table + self.trust * joint))


def points(seed: int) -> Tensor:
    """Let the model draw points [N]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn: Tensor = poutine.uncondition(Mixture())(torch.zeros(POINTS, dtype=FLOAT))
    return drawn


def log_dirichlet_multinomial(counts: Tensor) -> Tensor:
    """Compute log p(assignments), w integrated, from the counts of the components [..., S]."""
    whole = torch.lgamma(ALPHA.sum()) - torch.lgamma(ALPHA.sum() + counts.sum(-1))
    return whole + (torch.lgamma(ALPHA + counts) - torch.lgamma(ALPHA)).sum(-1)


def log_normal_normal(x: Tensor, member: Tensor) -> Tensor:
    """Compute log p of the points of each component, its mean integrated: [N] and 0 or 1 [..., S, N] to [..., S].

    With n points of mean m and sum of squares q about it: N(m; m_k, t^2 + s^2/n) times what is about the mean.
    """
    n = member.sum(-1)
    mean = (member * x).sum(-1) / n.clamp(min=1)
    squares = (member * (x - mean[..., None]) ** 2).sum(-1)
    about = -0.5 * squares / WITHIN**2 - (n - 1) / 2 * math.log(2 * math.pi * WITHIN**2) - 0.5 * n.log()
    of_mean = dist.Normal(CENTRES, (AROUND**2 + WITHIN**2 / n.clamp(min=1)).sqrt()).log_prob(mean)
    return torch.where(n > 0, of_mean + about, 0.0)


def log_evidence(x: Tensor) -> Tensor:
    """Sum over all assignments of all points [N]."""
    components = torch.arange(len(CENTRES))
    assignments = torch.cartesian_prod(*[components] * len(x))  # [S^N, N]
    member = (assignments[:, None] == components[:, None]).to(FLOAT)  # [S^N, S, N]
    joint = log_dirichlet_multinomial(member.sum(-1)) + log_normal_normal(x, member).sum(-1)
    return joint.logsumexp(0)


def field(*, seed: int = 0) -> Field:
    """A few points, one datapoint in all."""
    x = points(seed)
    values = len(CENTRES)
    how = f"all {values}^{POINTS} assignments summed, weights and means integrated by conjugacy"
    return Field(Mixture(), Globals(POINTS), (x,), (), "assignment", log_evidence(x).item(), 0.0, how, False)
