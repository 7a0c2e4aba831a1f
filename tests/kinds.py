"""Programs of every kind of latent, one row of parameters for each datapoint; see test_what_runs.py."""

import itertools
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from programs import FLOAT

X = 0.7
MEANS = torch.tensor([1.0, -0.6, 0.3, -1.2], **FLOAT)


class Kind(NamedTuple):
    """A kind of guide: model and guide of parameters [N, ...], and what enumerates them.

    Attributes:
        shows: in words, for the table.
        model, guide: the programs.
        values: of one row of parameters, by name.
        outcomes: all values of the discrete sites of a datapoint; None where they are no finite sum.
        sites: the discrete ones, in the order in which the guide draws them.
        nesting: plates.
    """

    shows: str
    model: Any
    guide: Any
    values: dict
    outcomes: list | None
    sites: tuple[str, ...]
    nesting: int = 1


def observed(p):
    """The data that go with parameters [N, ...]."""
    return torch.full((len(p["a"]),), X, **FLOAT)


def data(p):
    return pyro.plate("data", len(p["a"]), dim=-1)


def observe(mean, x):
    pyro.sample("x", dist.Normal(mean, torch.ones((), **FLOAT)), obs=x)


def soft(value, size):
    """Weights over the values, of integers or of weights themselves."""
    if value.is_floating_point():
        return value
    return torch.zeros(*value.shape, size, **FLOAT).scatter(-1, value[..., None], 1.0)


def all_bits(number):
    return [torch.tensor(bits, **FLOAT) for bits in itertools.product([0.0, 1.0], repeat=number)]


def category(family):
    one_hot = family is dist.OneHotCategorical

    def model(p, x):
        with data(p):
            a = pyro.sample("a", family(logits=torch.tensor([0.2, 0.0, -0.3, 0.4], **FLOAT)))
            observe((soft(a, 4) * MEANS).sum(-1), x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", family(logits=p["a"]))

    values = torch.eye(4, **FLOAT) if one_hot else torch.arange(4)
    return model, guide, {"a": torch.tensor([0.5, -0.3, 0.1, -0.6], **FLOAT)}, [{"a": v} for v in values]


def one_bit():
    def model(p, x):
        with data(p):
            observe(2 * pyro.sample("a", dist.Bernoulli(torch.tensor(0.3, **FLOAT))), x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", dist.Bernoulli(logits=p["a"]))

    return model, guide, {"a": torch.tensor(0.4, **FLOAT)}, [{"a": b[0]} for b in all_bits(1)]


def bits():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Bernoulli(torch.full((3,), 0.4, **FLOAT)).to_event(1))
            observe(((a * MEANS[:3]).sum(-1) + 0.5) ** 2, x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", dist.Bernoulli(logits=p["a"]).to_event(1))

    return model, guide, {"a": torch.tensor([0.4, -0.8, 0.3], **FLOAT)}, [{"a": b} for b in all_bits(3)]


def categories():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(2, 3, **FLOAT)).to_event(1))
            first, second = soft(a, 3).unbind(-2)
            observe((first * MEANS[:3]).sum(-1) * (1 + (second * MEANS[1:]).sum(-1)), x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", dist.Categorical(logits=p["a"]).to_event(1))

    logits = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.8, -0.6]], **FLOAT)
    outcomes = [{"a": torch.tensor(pair)} for pair in itertools.product(range(3), repeat=2)]
    return model, guide, {"a": logits}, outcomes


def inner_plate():
    def model(p, x):
        with data(p):
            with pyro.plate("inner", 2, dim=-2):
                a = pyro.sample("a", dist.Bernoulli(logits=torch.zeros(2, 1, **FLOAT)))
            observe((a * MEANS[:2, None]).sum(-2, keepdim=True) ** 2, x)

    def guide(p, x):
        with data(p), pyro.plate("inner", 2, dim=-2):
            pyro.sample("a", dist.Bernoulli(logits=p["a"].T))

    outcomes = [{"a": b[:, None]} for b in all_bits(2)]
    return model, guide, {"a": torch.tensor([0.4, -0.8], **FLOAT)}, outcomes


def two_sites():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3, **FLOAT)))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, **FLOAT)))
            observe((soft(a, 3) * MEANS[:3]).sum(-1) * (1 + b), x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", dist.Categorical(logits=p["a"]))
            pyro.sample("b", dist.Bernoulli(logits=p["b"]))

    values = {"a": torch.tensor([0.5, -0.3, 0.1], **FLOAT), "b": torch.tensor(0.4, **FLOAT)}
    outcomes = [{"a": torch.tensor(a), "b": b[0]} for a in range(3) for b in all_bits(1)]
    return model, guide, values, outcomes


def autoregressive():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Bernoulli(torch.full((2,), 0.4, **FLOAT)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=a.sum(-1) - 1))
            observe((a * MEANS[:2]).sum(-1) + b, x)

    def guide(p, x):
        with data(p):
            a = pyro.sample("a", dist.Bernoulli(logits=p["a"]).to_event(1))
            pyro.sample("b", dist.Bernoulli(logits=(a * p["b"]).sum(-1)))

    values = {"a": torch.tensor([0.4, -0.8], **FLOAT), "b": torch.tensor([0.9, -0.5], **FLOAT)}
    outcomes = [{"a": a, "b": b[0]} for a in all_bits(2) for b in all_bits(1)]
    return model, guide, values, outcomes


def latent_after():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(4, **FLOAT)))
            z = pyro.sample("z", dist.Normal((soft(a, 4) * MEANS).sum(-1), torch.ones((), **FLOAT)))
            observe(z, x)

    def guide(p, x):
        with data(p):
            a = pyro.sample("a", dist.Categorical(logits=p["a"]))
            pyro.sample("z", dist.Normal((soft(a, 4) * p["z"]).sum(-1), torch.full((), 0.7, **FLOAT)))

    return model, guide, {"a": MEANS.flip(0), "z": MEANS / 2}, None


def latent_before():
    def model(p, x):
        with data(p):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **FLOAT), 1.0))
            a = pyro.sample("a", dist.Categorical(logits=z[..., None] * MEANS))
            observe((soft(a, 4) * MEANS).sum(-1) + z, x)

    def guide(p, x):
        with data(p):
            z = pyro.sample("z", dist.Normal(p["z"], torch.full((), 0.7, **FLOAT)))
            pyro.sample("a", dist.Categorical(logits=p["a"] + z[..., None]))

    return model, guide, {"a": MEANS.flip(0), "z": torch.tensor(0.3, **FLOAT)}, None


def counts():
    def model(p, x):
        with data(p):
            a = pyro.sample("a", dist.Poisson(torch.full((), 1.5, **FLOAT)))
            observe(a - 1, x)

    def guide(p, x):
        with data(p):
            pyro.sample("a", dist.Poisson(p["a"].exp()))

    # Beyond 20 there is less than 1e-14 of the probability.
    return model, guide, {"a": torch.tensor(0.1, **FLOAT)}, [{"a": a} for a in torch.arange(20.0, **FLOAT)]


KINDS = {
    "category": Kind("one value of several", *category(dist.Categorical), ("a",)),
    "one-hot": Kind("the same, one-hot", *category(dist.OneHotCategorical), ("a",)),
    "bit": Kind("one bit", *one_bit(), ("a",)),
    "bits": Kind("a vector of bits", *bits(), ("a",)),
    "categories": Kind("a vector of values", *categories(), ("a",)),
    "inner plate": Kind("bits in a plate inside the datapoint", *inner_plate(), ("a",), 2),
    "two sites": Kind("two sites, a value and a bit", *two_sites(), ("a", "b")),
    "autoregressive": Kind("bits, and one that depends on them", *autoregressive(), ("a", "b")),
    "latent after": Kind("a value, and a Gaussian given it", *latent_after(), ("a",)),
    "latent before": Kind("a Gaussian, and a value given it", *latent_before(), ("a",)),
    "counts": Kind("a count without end (Poisson)", *counts(), ("a",)),
}


def tables(kind, p):
    """log q and log w of all outcomes [N, outcomes], by Pyro's own traces."""
    log_q, log_w, x = [], [], observed(p)
    for outcome in kind.outcomes:
        found = []
        for program in (kind.guide, kind.model):
            trace = poutine.trace(poutine.condition(program, data=outcome)).get_trace(p, x)
            trace.compute_log_prob()
            total = torch.zeros(len(p["a"]), **FLOAT)
            for site in trace.nodes.values():
                if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                    log_prob = site["log_prob"].expand(*site["log_prob"].shape[:-1], len(p["a"]))
                    total = total + log_prob.reshape(-1, len(p["a"])).sum(0)
            found.append(total)
        log_q.append(found[0])
        log_w.append(found[1] - found[0])
    return torch.stack(log_q, -1), torch.stack(log_w, -1)
