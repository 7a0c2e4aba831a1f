r"""A switching linear state space model: a discrete regime says how a continuous state moves.

.. math::
    r_t \mid r_{t-1} \sim \text{Bernoulli}(\text{stay or switch}), \qquad
    z_t \mid z_{t-1}, r_t \sim N(a_r z_{t-1} + c_r, \, s_r^2), \qquad  x_t \mid z_t \sim N(z_t, \, o^2)

The guide draws the regimes one after the other and then the states, each given its regime and the state before.
Given all regimes the model is linear and Gaussian, so the evidence is a sum over all 2^T paths of the regimes of
what a Kalman filter says (Ghahramani & Hinton 2000, "Variational learning for switching state-space models").
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .interface import Field

FLOAT = torch.float64
STEPS, SEQUENCES = 6, 4
STAY = 0.8  # probability of the regime before; the first is 0 or 1 alike
DECAY = torch.tensor([0.95, 0.5], dtype=FLOAT)  # a: a slow regime, and one that is drawn to 2
DRIFT = torch.tensor([0.0, 1.0], dtype=FLOAT)  # c
NOISE = torch.tensor([0.2, 0.6], dtype=FLOAT)  # s
FIRST, SEEN = 1.0, 0.3  # standard deviations of z_0 and of x_t given z_t


def either(values: Tensor, regime: Tensor) -> Tensor:
    """Read the value of a regime [..., 2]; in between for a relaxed one."""
    return values[..., 0] + regime * (values[..., 1] - values[..., 0])


class Switching(nn.Module):
    """p(regimes) p(states | regimes) p(x | states)."""

    def forward(self, x: Tensor) -> Tensor:
        """Sequences x [B, T]; returns them."""
        seen = []
        with pyro.plate("data", len(x)):
            regime = state = torch.zeros(len(x), dtype=FLOAT)
            for t in range(x.shape[1]):
                on = STAY * regime + (1 - STAY) * (1 - regime) if t else torch.full_like(regime, 0.5)
                regime = pyro.sample(f"regime_{t}", dist.Bernoulli(on))
                mean = either(DECAY, regime) * state + either(DRIFT, regime)
                moved = dist.Normal(mean, either(NOISE, regime)) if t else dist.Normal(state, FIRST)
                state = pyro.sample(f"state_{t}", moved)
                seen.append(pyro.sample(f"x_{t}", dist.Normal(state, SEEN), obs=x[:, t]))
        return torch.stack(seen, -1)


class Paths(nn.Module):
    """q(r_t | r_t-1) and q(z_t | z_t-1, r_t), with parameters for each sequence and step."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        sequences, steps = x.shape
        self.regime = nn.Parameter(torch.zeros(sequences, steps, 2, dtype=FLOAT))  # logits after 0 and after 1
        self.slope = nn.Parameter(torch.zeros(sequences, steps, 2, dtype=FLOAT))
        self.shift = nn.Parameter(x[..., None].repeat(1, 1, 2))  # the state is near what is seen
        self.log_scale = nn.Parameter(torch.full((sequences, steps, 2), math.log(SEEN), dtype=FLOAT))

    def forward(self, x: Tensor) -> None:
        """The same arguments as the model's."""
        regimes: list[Tensor] = []
        with pyro.plate("data", len(x)):
            regime = state = torch.zeros(len(x), dtype=FLOAT)
            for t in range(x.shape[1]):
                logits = either(self.regime[:, t], regime)
                regime = pyro.sample(f"regime_{t}", dist.Bernoulli(logits=logits))
                regimes.append(regime)
            for t, regime in enumerate(regimes):
                mean = either(self.slope[:, t], regime) * state + either(self.shift[:, t], regime)
                scale = either(self.log_scale[:, t], regime).exp()
                state = pyro.sample(f"state_{t}", dist.Normal(mean, scale))


def sequences(seed: int) -> Tensor:
    """Let the model draw sequences [B, T]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn: Tensor = poutine.uncondition(Switching())(torch.zeros(SEQUENCES, STEPS, dtype=FLOAT))
    return drawn


def kalman(x: Tensor, regimes: Tensor) -> Tensor:
    """Compute log p(x | regimes) of each sequence under each path: [B, T] and [P, T] to [P, B]."""
    mean, variance, total = torch.zeros(1, 1, dtype=FLOAT), torch.full((1, 1), FIRST**2, dtype=FLOAT), 0.0
    for t in range(x.shape[1]):
        if t:
            r = regimes[:, t, None]
            mean, variance = DECAY[r] * mean + DRIFT[r], DECAY[r] ** 2 * variance + NOISE[r] ** 2
        expected = variance + SEEN**2
        total = total + dist.Normal(mean, expected.sqrt()).log_prob(x[:, t])
        gain = variance / expected
        mean, variance = mean + gain * (x[:, t] - mean), (1 - gain) * variance
    return torch.as_tensor(total)


def log_evidence(x: Tensor) -> Tensor:
    """Sum over all paths of the regimes: log p(x) of each sequence [B]."""
    regimes = torch.tensor(list(itertools.product((0, 1), repeat=x.shape[1])))  # [2^T, T]
    switches = (regimes[:, 1:] != regimes[:, :-1]).sum(-1, keepdim=True).to(FLOAT)
    stays = x.shape[1] - 1 - switches
    log_prior = math.log(0.5) + switches * math.log(1 - STAY) + stays * math.log(STAY)
    return (log_prior + kalman(x, regimes)).logsumexp(0)


def field(*, seed: int = 0) -> Field:
    """A few sequences, each one datapoint."""
    x = sequences(seed)
    how = f"all {2**STEPS} paths of the regimes summed, a Kalman filter for each"
    sites = tuple(f"regime_{t}" for t in range(STEPS))
    return Field(Switching(), Paths(x), (x,), ("data",), sites, log_evidence(x).sum().item(), 0.0, how, False)
