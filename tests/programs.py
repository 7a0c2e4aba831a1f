"""Programs whose gradients are known, with one row of parameters for each datapoint.

Because every datapoint has parameters of its own, one backward pass gives one gradient per datapoint: all
outcomes of an enumeration, or all trials of a Monte Carlo test, at once.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

S, T = 5, 2
SCALE = 0.7  # on the second site, as in annealing
SUBSAMPLING = 2.0  # full size over subsample size
FLOAT = {"dtype": torch.float64}


def rows(values, count):
    """Leaves [count, ...] whose gradients are per datapoint."""
    return {name: v.detach().expand(count, *v.shape).clone().requires_grad_() for name, v in values.items()}


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)


class Discrete:
    """Two discrete sites, the second depending on the first, or one; masks, a scale, a subsampled plate.

    `kind` [N] says of each datapoint: 0 it counts, 1 its second site is masked, 2 all of it is masked.
    """

    def __init__(self, *, two_sites=True, plain=False):
        self.two_sites, self.plain = two_sites, plain
        generator = torch.Generator().manual_seed(0)
        shape = {"prior_a": (S,), "prior_b": (S, T), "mean": (S, T), "guide_a": (S,), "guide_b": (S, T)}
        self.values = {n: torch.randn(s, generator=generator, **FLOAT) for n, s in shape.items()}
        self.x = torch.tensor(0.4, **FLOAT)
        self.outcomes = S * T if two_sites else S
        self.site = ("a", "b") if two_sites else "a"

    def _plate(self, kind):
        return pyro.plate("data", int(SUBSAMPLING) * len(kind), subsample=torch.arange(len(kind)))

    def _second(self, kind, p, name, a):
        with poutine.scale(scale=1.0 if self.plain else SCALE), poutine.mask(mask=self._live_b(kind)):
            logits = p[name][torch.arange(len(kind)), a]
            return pyro.sample("b", dist.Categorical(logits=logits))

    def _live(self, kind):
        return torch.ones_like(kind, dtype=torch.bool) if self.plain else kind != 2

    def _live_b(self, kind):
        return torch.ones_like(kind, dtype=torch.bool) if self.plain else kind == 0

    def model(self, p, kind):
        with self._plate(kind), poutine.mask(mask=self._live(kind)):
            a = pyro.sample("a", dist.Categorical(logits=p["prior_a"]))
            b = self._second(kind, p, "prior_b", a) if self.two_sites else torch.zeros_like(a)
            pyro.sample(
                "x", dist.Normal(p["mean"][torch.arange(len(kind)), a, b], 1.0), obs=self.x.expand(len(kind))
            )

    def guide(self, p, kind):
        with self._plate(kind), poutine.mask(mask=self._live(kind)):
            a = pyro.sample("a", dist.Categorical(logits=p["guide_a"]))
            if self.two_sites:
                self._second(kind, p, "guide_b", a)

    def tables(self, p, kind):
        """log w and log of the probability of drawing, [N, outcomes], written without Pyro."""
        live, live_b = self._live(kind)[:, None, None], self._live_b(kind)[:, None, None]
        scale = 1.0 if self.plain else SCALE
        guide_a, guide_b = p["guide_a"].log_softmax(-1)[:, :, None], p["guide_b"].log_softmax(-1)
        x = log_normal(self.x, p["mean"], torch.tensor(1.0, **FLOAT))
        ratio_a = p["prior_a"].log_softmax(-1)[:, :, None] - guide_a
        ratio_b = scale * (p["prior_b"].log_softmax(-1) - guide_b) * live_b
        if self.two_sites:
            return ((x + ratio_a + ratio_b) * live).flatten(1), (guide_a + guide_b).flatten(1)
        return ((x[:, :, :1] + ratio_a) * live).flatten(1), guide_a.flatten(1)

    def replayed_guide(self, outcome):
        """The guide with drawn values fixed; outcome [K, N] = T a + b, or a."""
        values = {"a": outcome // T, "b": outcome % T} if self.two_sites else {"a": outcome}
        return Fixed(values)(self.guide)


class Fixed(Messenger):
    """Decide values, but let the plates still expand the distributions (replay would not)."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class Mixed:
    """An address and a Gaussian given it: a linear-Gaussian memory model, per datapoint."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.size = 3
        names = ("entries", "address", "loc", "log_scale")
        self.values = {n: 0.7 * torch.randn(self.size, generator=generator, **FLOAT) for n in names}
        self.x = torch.tensor(0.7, **FLOAT)

    def _plate(self, x):
        return pyro.plate("data", int(SUBSAMPLING) * len(x), subsample=torch.arange(len(x)))

    @staticmethod
    def read(table, a):
        """table [N, S] at a: integers [..., N], or weights [..., N, S]."""
        if a.is_floating_point():
            return (table * a).sum(-1)
        return table[torch.arange(len(table)), a]

    def model(self, p, x):
        with self._plate(x):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(len(x), self.size, **FLOAT)))
            z = pyro.sample("z", dist.Normal(self.read(p["entries"], a), 1.0))
            return pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, p, x):
        with self._plate(x):
            a = pyro.sample("a", dist.Categorical(logits=p["address"]))
            pyro.sample("z", dist.Normal(self.read(p["loc"], a), self.read(p["log_scale"], a).exp()))

    def log_joint(self, p, a):
        """log q(a), and log w of a with z drawn anew, [N]; a is one integer."""
        scale = p["log_scale"][:, a].exp()
        z = p["loc"][:, a] + scale * torch.randn_like(scale)
        log_q = p["address"].log_softmax(-1)[:, a]
        log_p = -math.log(self.size) + log_normal(z, p["entries"][:, a], torch.tensor(1.0))
        log_p = log_p + log_normal(self.x, z, torch.tensor(0.5))
        return log_q, log_p - log_q - log_normal(z, p["loc"][:, a], scale)
