"""Programs of address, style and z with known parts of the bound, and what their parts are.

Means over draws are compared within five standard errors, which are stated or follow from the number of draws.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

B, S = 6, 4
torch.manual_seed(5)
X, ENTRIES = torch.randn(B), torch.randn(S)
LOGITS = {which: torch.randn(S) for which in "pq"}
TABLES = {which: torch.randn(3, S) for which in "pq"}
CLASSES = {which: torch.randn(3) for which in "pq"}
Q_Z = Normal(0.3, 0.7)  # of the guide where z depends on nothing; p(z) is the standard normal
KL_Z = kl_divergence(Q_Z, Normal(0.0, 1.0)).item()


def programs(body):
    """Model and guide from one function of which ("p" or "q") and x, in the plate `data`."""

    def program(which):
        def run(memory, x):
            with pyro.plate("data", len(x)):
                body(which, x)

        return run

    return program("p"), program("q")


def observe(which, name, mean, x):
    if which == "p":
        pyro.sample(name, dist.Normal(mean, 1.0), obs=x)


def sample_z(which, name="z"):
    return pyro.sample(name, dist.Normal(0.0, 1.0) if which == "p" else dist.Normal(0.3, 0.7))


def sample_address(which, logits=None):
    return pyro.sample("address", dist.Categorical(logits=LOGITS[which] if logits is None else logits))


def kl_of(log_q, log_p):
    """KL of two tables of logits [..., S]."""
    return kl_divergence(Categorical(logits=log_q), Categorical(logits=log_p))


def expected_log_normal(x, mean, variance):
    """E log N(x; m, 1) for m of this mean and variance."""
    return -0.5 * math.log(2 * math.pi) - 0.5 * ((x - mean) ** 2 + variance)


NODES, WEIGHTS = (torch.from_numpy(a).float() for a in np.polynomial.hermite_e.hermegauss(60))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def style_after(which, x):
    a = sample_address(which)
    s = pyro.sample("style", dist.Categorical(logits=CLASSES[which]))
    z = sample_z(which)
    observe(which, "x", ENTRIES[a] + z + s, x)


def by_the_entry(which, x):
    a = sample_address(which)
    pyro.sample("style", dist.Categorical(logits=TABLES[which].T[a]))
    sample_z(which, "z1")
    observe(which, "x", 0.0, x)


def no_address(which, x):
    observe(which, "x", sample_z(which), x)


KL_A = kl_of(LOGITS["q"], LOGITS["p"]).item()
KL_STYLE = kl_of(CLASSES["q"], CLASSES["p"]).item()
KL_COIN = kl_divergence(Bernoulli(0.6), Bernoulli(0.3)).item()
K = 6000
NOISE = 5 * 3.0 / math.sqrt(K)  # no part here has a standard deviation above 3 nats
