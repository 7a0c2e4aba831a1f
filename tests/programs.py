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

from vma_pyro.infer import BINARY, ESTIMATORS

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


class Binary:
    """A vector of two bits, or a third that depends on them as well, whose gradients are known.

    `second` says whether there is the third bit, which each particle draws from a distribution of its own.
    """

    def __init__(self, *, second):
        self.second = second
        generator = torch.Generator().manual_seed(1)
        shape = {"prior_b": (2,), "prior_c": (4,), "mean": (4, 2), "guide_c": (4,)}
        self.values = {n: torch.randn(s, generator=generator, **FLOAT) for n, s in shape.items()}
        self.values["guide_b"] = torch.tensor([0.8, -1.3], **FLOAT)
        self.x = torch.tensor(0.4, **FLOAT)
        self.bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], **FLOAT)

    @staticmethod
    def row(b):
        """The position of two bits in the tables."""
        return (2 * b[..., 0] + b[..., 1]).long()

    def _third(self, p, name, b):
        table = p[name]
        return pyro.sample("c", dist.Bernoulli(logits=table[torch.arange(len(table)), self.row(b)]))

    def model(self, p):
        rows = torch.arange(len(p["mean"]))
        with pyro.plate("data", int(SUBSAMPLING) * len(rows), subsample=rows):
            b = pyro.sample("b", dist.Bernoulli(logits=p["prior_b"]).to_event(1))
            c = self._third(p, "prior_c", b).long() if self.second else 0
            pyro.sample("x", dist.Normal(p["mean"][rows, self.row(b), c], 1.0), obs=self.x.expand(len(rows)))

    def guide(self, p):
        rows = torch.arange(len(p["mean"]))
        with pyro.plate("data", int(SUBSAMPLING) * len(rows), subsample=rows):
            b = pyro.sample("b", dist.Bernoulli(logits=p["guide_b"]).to_event(1))
            if self.second:
                self._third(p, "guide_c", b)

    def tables(self, p):
        """log w and log of the probability of drawing [N, outcomes], written without Pyro."""

        def log_bernoulli(logits, value):
            return value * logits.sigmoid().log() + (1 - value) * (-logits).sigmoid().log()

        third = torch.tensor([0.0, 1.0], **FLOAT)
        parts = {}
        for which in ("prior", "guide"):
            parts[which] = log_bernoulli(p[f"{which}_b"][:, None], self.bits).sum(-1)[..., None]
            if self.second:
                parts[which] = parts[which] + log_bernoulli(p[f"{which}_c"][..., None], third)
        x = log_normal(self.x, p["mean"], torch.tensor(1.0, **FLOAT))
        x = x if self.second else x[..., :1]
        return (x + parts["prior"] - parts["guide"]).flatten(1), parts["guide"].flatten(1)


class Value:
    """One categorical site, integer or one-hot; the last `impossible` values have no probability under q."""

    def __init__(self, size, *, impossible=0, family=dist.Categorical):
        generator = torch.Generator().manual_seed(size)
        self.size, self.family = size, family
        self.values = {n: torch.randn(size, generator=generator, **FLOAT) for n in ("prior", "mean", "guide")}
        if impossible:
            self.values["guide"][-impossible:] = -math.inf
        self.q = self.values["guide"].softmax(0)

    def _of(self, p, name, value):
        if self.family is dist.OneHotCategorical:
            return (p[name] * value).sum(-1)
        return p[name][torch.arange(len(p[name])), value]

    def model(self, p):
        with pyro.plate("data", len(p["mean"])):
            value = pyro.sample("a", self.family(logits=p["prior"]))
            x = torch.full((len(p["mean"]),), 0.4, **FLOAT)
            pyro.sample("x", dist.Normal(self._of(p, "mean", value), 1.0), obs=x)

    def guide(self, p):
        with pyro.plate("data", len(p["mean"])):
            pyro.sample("a", self.family(logits=p["guide"]))

    def objective(self):
        """The one-sample bound and its gradient."""
        p = rows(self.values, 1)
        log_q = p["guide"].log_softmax(-1)
        log_w = p["prior"].log_softmax(-1) + dist.Normal(p["mean"], 1.0).log_prob(torch.tensor(0.4, **FLOAT))
        value = (log_q.exp() * (log_w - torch.where(log_q > -math.inf, log_q, 0.0))).sum()
        return value.item(), [g[0] for g in torch.autograd.grad(value, list(p.values()))]


# Most programs here have categorical sites, which estimators of binary values refuse.
CATEGORICAL = [name for name in ESTIMATORS if name not in BINARY]
RELAXED = [name for name in ESTIMATORS if ESTIMATORS[name](4, "a", 1).objective == "relaxed"]
# Those that show programs weights over values, or one-hot values, in the place of integers.
SOFT = [*RELAXED, "double-cv", "double-cv+common", "rodeo", "rebar", "relax"]
