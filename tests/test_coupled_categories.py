"""Coupled categorical values: expectations over all pairs, whose probabilities are counted in another way.

Trees, sticks and values in line, also with values that have no probability, integer and one-hot.
"""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch

from programs import FLOAT, Value, rows
from vma_pyro.infer import CARMS, DisARMStickBreaking, DisARMTree
from vma_pyro.infer.engine.coupled import Drawn
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators import carms


def by_tree(q):
    """P(a, a') when two go down a balanced tree, in opposite directions as long as they are together."""
    joint, depth = torch.zeros(len(q), len(q), **FLOAT), max(1, math.ceil(math.log2(len(q))))
    mass = torch.cat([q, torch.zeros(2**depth - len(q), **FLOAT)])

    def down(low, high, p):
        if high - low == 1:
            joint[low, low] += p
            return
        middle = (low + high) // 2
        left, right = mass[low:middle].sum(), mass[middle:high].sum()
        share = right / (left + right)
        for start, end, same in ((middle, high, 2 * share - 1), (low, middle, 1 - 2 * share)):
            if same > 0:
                down(start, end, p * same)
        apart = p * min(share, 1 - share)
        if apart > 0:
            table = apart * torch.outer(mass[low:middle] / left, mass[middle:high] / right)
            table = table[: len(q) - low, : max(0, len(q) - middle)]
            joint[low:middle, middle:high] += table
            joint[middle:high, low:middle] += table.T

    down(0, 2**depth, torch.tensor(1.0, **FLOAT))
    return joint


def by_sticks(q):
    """P(a, a') when two decide at each value, in opposite directions, whether to take it."""
    joint, p = torch.zeros(len(q), len(q), **FLOAT), 1.0
    for i in range(len(q)):
        left = q[i:].sum()
        if p <= 0 or left <= 0:
            break
        share = (q[i] / left).item() if i + 1 < len(q) else 1.0
        joint[i, i] += p * max(0.0, 2 * share - 1)
        if min(share, 1 - share) > 0:
            others = p * min(share, 1 - share) * q[i + 1 :] / q[i + 1 :].sum()
            joint[i, i + 1 :] += others
            joint[i + 1 :, i] += others
        p *= max(0.0, 1 - 2 * share)
    return joint


def in_line(q):
    """P(a, a') for two that read the copula of K = 2, u and 1 - u, in every order of the values."""
    size, joint = len(q), torch.zeros(len(q), len(q), **FLOAT)
    orders = carms.orders_of(size)
    for order in orders:
        ends = torch.cat([torch.zeros(1, **FLOAT), q[order].cumsum(0)])
        cuts = torch.cat([ends, 1 - ends]).clamp(0, 1).sort().values
        for low, high in itertools.pairwise(cuts.tolist()):
            middle = (low + high) / 2
            places = [int((ends[1:-1] <= u).sum()) for u in (middle, 1 - middle)]
            joint[order[places[0]], order[places[1]]] += (high - low) / len(orders)
    return joint


CATEGORICAL = {
    "tree": (DisARMTree, by_tree),
    "sticks": (DisARMStickBreaking, by_sticks),
    "in line": (CARMS, in_line),
}


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize(("size", "impossible"), [(2, 0), (3, 0), (4, 0), (5, 0), (8, 0), (9, 0), (6, 2)])
@pytest.mark.parametrize("name", CATEGORICAL)
def test_categorical_values_over_all_pairs(name, size, impossible, family, monkeypatch):
    kind, pairs = CATEGORICAL[name]
    program = Value(size, impossible=impossible, family=family)
    joint = pairs(program.q)
    torch.testing.assert_close(joint.sum(0), program.q, rtol=1e-9, atol=1e-12)
    outcomes = torch.nonzero(joint > 1e-14)
    weight = joint[outcomes[:, 0], outcomes[:, 1]]
    values = outcomes.T if family is dist.Categorical else torch.nn.functional.one_hot(outcomes.T, size).double()
    p = rows(program.values, len(outcomes))
    coupling = kind.coupling
    memory = coupling.draw(program.family(logits=p["guide"].detach()), 2).memory
    monkeypatch.setattr(type(coupling), "draw", lambda self, fn, number: Drawn(values, memory))
    estimate = kind(2)._estimate(Programs(program.model, program.guide, (p,)))
    want_value, want = program.objective()
    assert (weight * estimate.value).sum().item() == pytest.approx(want_value, abs=1e-10)
    gradients = torch.autograd.grad(estimate.surrogate, list(p.values()))
    for got, wanted in zip(gradients, want, strict=True):
        torch.testing.assert_close(torch.einsum("o,os->s", weight, got), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("name", CATEGORICAL)
def test_pairs_are_drawn_as_often_as_that(name, K):
    """60,000 draws; of three particles by CARMS the first and the last, with r by its formula."""
    kind, pairs = CATEGORICAL[name]
    torch.manual_seed(0)
    program, draws = Value(5), 60_000
    drawn = kind.coupling.draw(dist.Categorical(logits=program.values["guide"].expand(draws, 5)), K)
    joint = pairs(program.q)
    one, other = (drawn.values[0], drawn.values[K - 1 if name == "in line" else 1])
    if K == 3 and name == "in line":
        weights = carms.weights_of_pairs(program.q, carms.orders_of(5), 3)
        joint = torch.outer(program.q, program.q) / weights
    found = torch.bincount(5 * one + other, minlength=25).reshape(5, 5) / draws
    spread = (joint * (1 - joint) / draws).sqrt()
    assert ((found - joint).abs() <= 4.5 * spread + 1e-9).all()
    if K == 3 and name != "in line":  # the last is alone
        shares = torch.bincount(drawn.values[2], minlength=5) / draws
        torch.testing.assert_close(shares.double(), program.q, rtol=0, atol=0.006)
