"""Programs of other fields: their densities and evidences, each against a computation of another kind."""

import functools
import itertools
import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from experiments.programs import global_mixture, phylogenetics, switching
from experiments.programs.trees import JukesCantor, topologies
from programs import FLOAT
from vma_pyro.infer import log_weights

FIELDS = {
    "phylogenetics": phylogenetics.field,
    "switching": switching.field,
    "global mixture": global_mixture.field,
}


@functools.cache
def made(name):
    return FIELDS[name]()


def clades(children, taxa):
    """The leaves below each inner node but the last, which name an unrooted tree."""
    below = {leaf: frozenset([leaf]) for leaf in range(1, taxa)}
    for inner, (one, two) in enumerate(children.tolist()):
        assert not below[one] & below[two]
        below[taxa + inner] = below[one] | below[two]
    assert below[2 * taxa - 3] == frozenset(range(1, taxa))
    return frozenset(below[node] for node in range(taxa, 2 * taxa - 3))


@pytest.mark.parametrize(("taxa", "number"), [(3, 1), (4, 3), (5, 15), (6, 105)])
def test_all_trees_are_listed_once(taxa, number):
    trees = topologies(taxa)
    assert trees.shape == (number, taxa - 2, 2)
    assert len({clades(children, taxa) for children in trees}) == number


def column_probability(children, branches, column):
    """The sum over all letters of the inner nodes, with the matrix exponential of the rates."""
    taxa = len(column)
    rates = torch.full((4, 4), 1 / 3, **FLOAT) - 4 / 3 * torch.eye(4, **FLOAT)
    steps = torch.linalg.matrix_exp(rates * branches[:, None, None])
    edges = [(child, taxa + inner) for inner, pair in enumerate(children.tolist()) for child in pair]
    total = 0.0
    for hidden in itertools.product(range(4), repeat=taxa - 2):
        letters = [*column.tolist(), *hidden]
        term = 0.25 * steps[2 * taxa - 4, letters[0], letters[2 * taxa - 3]]
        for child, parent in edges:
            term = term * steps[child - 1, letters[parent], letters[child]]
        total = total + term
    return total


@pytest.mark.parametrize(("taxa", "some"), [(4, 3), (5, 4)])
def test_pruning_is_the_sum_over_the_letters_of_the_inner_nodes(taxa, some):
    """Several trees, branches and columns at once, in dimensions of their own, against one at a time."""
    trees = topologies(taxa)[torch.randperm(len(topologies(taxa)))[:some]]  # [S]
    branches = torch.rand(2, 1, 1, 2 * taxa - 3, **FLOAT)  # [K, 1, 1]
    columns = torch.randint(4, (5, taxa))  # [P]
    got = JukesCantor(trees[:, None], branches).log_prob(columns)
    assert got.shape == (2, some, 5)
    for k, s, p in itertools.product(range(2), range(some), range(5)):
        want = column_probability(trees[s], branches[k, 0, 0], columns[p]).log()
        torch.testing.assert_close(got[k, s, p], want, rtol=1e-12, atol=1e-12)


def test_the_probabilities_of_all_columns_sum_to_one():
    columns = torch.cartesian_prod(*[torch.arange(4)] * 5)
    trees = topologies(5)
    branches = torch.rand(len(trees), 1, 7, **FLOAT)
    total = JukesCantor(trees[:, None], branches).log_prob(columns).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(15, **FLOAT), rtol=0, atol=1e-12)


def test_drawn_columns_have_these_probabilities():
    """How often each pair of taxa agrees, 20,000 columns of each of two trees, |z| < 4.5."""
    trees = topologies(5)[[2, 11]]
    branches = torch.rand(2, 7, **FLOAT)
    drawn = JukesCantor(trees, branches).sample((20_000,))
    assert drawn.shape == (20_000, 2, 5)
    columns = torch.cartesian_prod(*[torch.arange(4)] * 5)
    probs = JukesCantor(trees, branches).log_prob(columns[:, None]).exp()  # [1024, 2]
    for one, two in itertools.combinations(range(5), 2):
        want = (probs * (columns[:, one] == columns[:, two])[:, None]).sum(0)
        got = (drawn[..., one] == drawn[..., two]).double().mean(0)
        assert ((got - want).abs() < 4.5 * (want * (1 - want) / 20_000).sqrt()).all()


@pytest.mark.parametrize(("order", "a"), [(3, 7.5), (6, 1.0), (9, 0.4)])
def test_gauss_quadrature_is_exact_up_to_its_degree(order, a):
    nodes, weights = phylogenetics.gauss_beta(order, a)
    degree = torch.arange(2 * order + 1, **FLOAT)
    off = ((weights * nodes ** degree[:, None]).sum(-1) - a / (a + degree)).abs()
    assert off[:-1].max() < 1e-13
    assert off[-1] > 100 * off[:-1].max()  # one degree more is not


def evidence_on_the_full_grid(columns, order):
    """All branches of all trees on a grid of quadrature nodes, by the general pruning; each column once."""
    taxa = columns.shape[1]
    nodes, weights = phylogenetics.gauss_beta(order, 0.75 * phylogenetics.RATE)
    number = 2 * taxa - 3
    grid = torch.cartesian_prod(*[-0.75 * nodes.log()] * number)[:, None]
    log_weight = torch.cartesian_prod(*[weights.log()] * number).sum(-1)
    trees = topologies(taxa)
    joint = JukesCantor(trees[:, None, None], grid).log_prob(columns).sum(-1) + log_weight
    return (joint.flatten().logsumexp(0) - math.log(len(trees))).item()


def test_the_evidence_of_four_taxa_is_that_of_the_full_grid():
    columns = torch.randint(4, (6, 4))
    got = phylogenetics.evidence_of_four(columns, torch.ones(6, **FLOAT), 4)
    assert got.item() == pytest.approx(evidence_on_the_full_grid(columns, 4), abs=1e-11)
    distinct, counts = columns[[0, 1, 1, 2, 0, 0]].unique(dim=0, return_counts=True)
    repeated = phylogenetics.evidence_of_four(distinct, counts.double(), 4)
    assert repeated.item() == pytest.approx(evidence_on_the_full_grid(columns[[0, 1, 1, 2, 0, 0]], 4), abs=1e-11)


def test_the_evidence_of_four_taxa_converges():
    """At half the degree, 15 for 30 columns, rounding is all that is left; below that it comes near."""
    columns, counts = phylogenetics.alignment(4, 0)
    *below, exact, more = (phylogenetics.evidence_of_four(columns, counts, n).item() for n in (6, 12, 16, 17))
    assert exact == pytest.approx(more, abs=1e-11)
    assert 1e-6 < abs(below[0] - exact) < 1e-3
    assert 1e-11 < abs(below[1] - exact) < 1e-7


@pytest.mark.parametrize("taxa", [4, 5])
def test_importance_sampling_finds_the_exact_evidence(taxa):
    """Three columns: two nodes a branch are exact. 4,000 draws a tree, |z| < 4.5."""
    columns = torch.randint(4, (3, taxa))
    exact = evidence_on_the_full_grid(columns, 2)
    got, error = phylogenetics.evidence_by_sampling(columns, torch.ones(3, **FLOAT), draws=4000, seed=1)
    assert 0 < error < 0.02
    assert abs(got - exact) < 4.5 * error


def test_importance_sampling_of_a_whole_alignment():
    """Thirty columns of four taxa against the quadrature, 4,000 draws a tree, |z| < 4.5."""
    columns, counts = phylogenetics.alignment(4, 0)
    got, error = phylogenetics.evidence_by_sampling(columns, counts, draws=4000, seed=2)
    assert abs(got - phylogenetics.evidence_of_four(columns, counts, 16).item()) < 4.5 * error < 0.1


def joint_gaussian(x, path):
    """log p(x | regimes): the states are a matrix times independent noises."""
    steps = len(path)
    mixing, mean = torch.zeros(steps, steps, **FLOAT), torch.zeros(steps, **FLOAT)
    mixing[0, 0] = switching.FIRST
    for t in range(1, steps):
        r = path[t]
        mixing[t] = switching.DECAY[r] * mixing[t - 1]
        mixing[t, t] = switching.NOISE[r]
        mean[t] = switching.DECAY[r] * mean[t - 1] + switching.DRIFT[r]
    covariance = mixing @ mixing.T + switching.SEEN**2 * torch.eye(steps, **FLOAT)
    return dist.MultivariateNormal(mean, covariance).log_prob(x)


def test_the_kalman_filter_is_the_joint_gaussian_and_the_paths_sum():
    x = torch.randn(3, 5, **FLOAT)
    paths = list(itertools.product((0, 1), repeat=5))
    want = torch.stack([joint_gaussian(x, path) for path in paths])  # [P, B]
    torch.testing.assert_close(switching.kalman(x, torch.tensor(paths)), want, rtol=1e-10, atol=1e-10)
    prior = []
    for path in paths:
        p = 0.5
        for before, now in itertools.pairwise(path):
            p *= switching.STAY if before == now else 1 - switching.STAY
        prior.append(p)
    evidence = (torch.tensor(prior, **FLOAT)[:, None] * want.exp()).sum(0).log()
    torch.testing.assert_close(switching.log_evidence(x), evidence, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 0, 1), (1, 3, 2), (0, 0, 7)])
def test_the_dirichlet_multinomial_is_an_integral(counts):
    """w = (1 - u^2, u^2 s^2, u^2 (1 - s^2)) makes it one of a polynomial, which Gauss and Legendre sum exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    u, s = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes)).T / 2 + 0.5
    weight = torch.cartesian_prod(torch.tensor(weights), torch.tensor(weights)).prod(-1) / 4
    w = torch.stack([1 - u**2, u**2 * s**2, u**2 * (1 - s**2)], -1)
    density = dist.Dirichlet(global_mixture.ALPHA).log_prob(w).exp() * 4 * u**3 * s
    n = torch.tensor(counts, **FLOAT)
    want = (weight * density * (w**n).prod(-1)).sum().log()
    got = global_mixture.log_dirichlet_multinomial(n)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def log_member_density(x, k):
    """Points of one component: jointly Gaussian, as they share its mean."""
    if not len(x):
        return 0.0
    shared = torch.full((len(x), len(x)), global_mixture.AROUND**2, **FLOAT)
    covariance = shared + global_mixture.WITHIN**2 * torch.eye(len(x), **FLOAT)
    mean = global_mixture.CENTRES[k].expand(len(x))
    return dist.MultivariateNormal(mean, covariance).log_prob(x).item()


def test_the_evidence_of_the_mixture_is_the_sum_over_assignments():
    """Joint Gaussians for the means, and the weights one point after the other (Polya's urn)."""
    x = torch.randn(4, **FLOAT) * 2
    alpha, terms = global_mixture.ALPHA.tolist(), []
    for assignment in itertools.product(range(3), repeat=4):
        log_p, seen = 0.0, [0, 0, 0]
        for a in assignment:
            log_p += math.log((alpha[a] + seen[a]) / (sum(alpha) + sum(seen)))
            seen[a] += 1
        members = [x[torch.tensor(assignment) == k] for k in range(3)]
        terms.append(log_p + sum(log_member_density(of_k, k) for k, of_k in enumerate(members)))
    want = torch.tensor(terms, **FLOAT).logsumexp(0)
    torch.testing.assert_close(global_mixture.log_evidence(x), want, rtol=1e-10, atol=1e-10)


def density(program, values, args):
    return poutine.trace(poutine.condition(program, values)).get_trace(*args).log_prob_sum().item()


def test_the_programs_say_these_densities():
    """log p of data and latents at some values, site by site without Pyro's plates and handlers."""
    field = made("phylogenetics")
    columns, counts = field.args
    tree, b = torch.tensor(2), torch.rand(5, **FLOAT)
    want = -math.log(3) + (math.log(10.0) - 10.0 * b).sum()
    for column, count in zip(columns, counts, strict=True):
        want = want + count * column_probability(topologies(4)[2], b, column).log()
    got = density(field.model, {"topology": tree, "branches": b}, field.args)
    assert got == pytest.approx(want.item(), rel=1e-10)

    field = made("switching")
    (x,) = field.args
    path, states = [1, 1, 0, 0, 1, 0], torch.randn(4, 6, **FLOAT)
    want = dist.Normal(states, switching.SEEN).log_prob(x).sum() + 4 * math.log(0.5 * 0.8**2 * 0.2**3)
    want = want + dist.Normal(0.0, switching.FIRST).log_prob(states[:, 0]).sum()
    for t in range(1, 6):
        r = path[t]
        moved = switching.DECAY[r] * states[:, t - 1] + switching.DRIFT[r]
        want = want + dist.Normal(moved, switching.NOISE[r]).log_prob(states[:, t]).sum()
    values = {f"regime_{t}": torch.full((4,), float(r), **FLOAT) for t, r in enumerate(path)}
    values |= {f"state_{t}": states[:, t] for t in range(6)}
    assert density(field.model, values, field.args) == pytest.approx(want.item(), rel=1e-10)

    field = made("global mixture")
    (x,) = field.args
    w, means, a = torch.tensor([0.2, 0.5, 0.3], **FLOAT), torch.randn(3, **FLOAT), torch.arange(8) % 3
    want = dist.Dirichlet(global_mixture.ALPHA).log_prob(w) + w.log()[a].sum()
    want = want + dist.Normal(global_mixture.CENTRES, global_mixture.AROUND).log_prob(means).sum()
    want = want + dist.Normal(means[a], global_mixture.WITHIN).log_prob(x).sum()
    got = density(field.model, {"w": w, "means": means, "assignment": a}, field.args)
    assert got == pytest.approx(want.item(), rel=1e-10)


@pytest.mark.parametrize("name", FIELDS)
def test_the_data_are_those_of_the_seed_and_weights_fit_them(name):
    one, other = made(name), FIELDS[name](seed=1)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one.args, other.args, strict=True))
    assert one.evidence != other.evidence
    assert one.error == other.error == 0
    log_w = log_weights(one.model, one.guide, one.args, num_particles=7, batch_plates=one.batch_plates)
    assert log_w.shape == (7, len(one.args[0]) if one.batch_plates else 1)
    assert log_w.isfinite().all()
    assert log_w.dtype == torch.float64
    assert not list(one.model.parameters())


@pytest.mark.parametrize("draw", [partial(phylogenetics.alignment, 5), switching.sequences, global_mixture.points])
def test_data_are_drawn_again_from_their_seed(draw):
    state = torch.get_rng_state()
    one, same = draw(seed=3), draw(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
