r"""Variational phylogenetics in small: which tree relates some taxa, and how long its branches are.

.. math::
    p(\tau) \prod_c \text{Exp}(b_c; 10) \prod_i p(y_i \mid \tau, b), \qquad
    q(\tau) \prod_c \text{LogNormal}(b_c; \mu_{\tau c}, \sigma_{\tau c})

The topology is a discrete latent, uniform over all unrooted trees; the likelihood of an alignment is that of
Jukes & Cantor (see `trees`). After Zhang & Matsen 2019, "Variational Bayesian phylogenetic inference", who train
the topology by VIMCO and the branches pathwise, written by hand; their guide is a Bayesian network over subsplits,
and here it is a table of all trees.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .interface import Field
from .trees import LETTERS, JukesCantor, along, topologies

FLOAT = torch.float64
RATE = 10.0  # of the exponential prior: branches of 0.1 substitutions per site
COLUMNS = 30


class Phylogeny(nn.Module):
    """p(topology) p(branches) p(alignment | topology, branches)."""

    def __init__(self, taxa: int) -> None:
        super().__init__()
        self.children_of = topologies(taxa)
        self.prior = torch.zeros(len(self.children_of), dtype=FLOAT)
        self.rates = torch.full((2 * taxa - 3,), RATE, dtype=FLOAT)

    def forward(self, columns: Tensor, counts: Tensor) -> Tensor:
        """Distinct columns [P, n] of an alignment, and how often each is there [P]; returns the columns."""
        topology = pyro.sample("topology", dist.Categorical(logits=self.prior))
        branches = pyro.sample("branches", dist.Exponential(self.rates).to_event(1))
        with pyro.plate("patterns", len(columns)), poutine.scale(scale=counts):
            likelihood = JukesCantor(self.children_of[topology], branches)
            found: Tensor = pyro.sample("column", likelihood, obs=columns)
        return found


class Trees(nn.Module):
    """q(topology) q(branches | topology)."""

    def __init__(self, taxa: int) -> None:
        super().__init__()
        trees = len(topologies(taxa))
        self.logits = nn.Parameter(torch.zeros(trees, dtype=FLOAT))
        self.loc = nn.Parameter(torch.full((trees, 2 * taxa - 3), math.log(1 / RATE), dtype=FLOAT))
        self.log_scale = nn.Parameter(torch.zeros(trees, 2 * taxa - 3, dtype=FLOAT))

    def forward(self, columns: Tensor, counts: Tensor) -> None:
        """The same arguments as the model's."""
        topology = pyro.sample("topology", dist.Categorical(logits=self.logits))
        lengths = dist.LogNormal(self.loc[topology], self.log_scale[topology].exp())
        pyro.sample("branches", lengths.to_event(1))


def alignment(taxa: int, seed: int) -> tuple[Tensor, Tensor]:
    """Let the model draw an alignment; returns its distinct columns [P, n] and their counts [P]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = poutine.uncondition(Phylogeny(taxa))
        drawn = model(torch.zeros(COLUMNS, taxa, dtype=torch.long), torch.ones(COLUMNS, dtype=FLOAT))
    columns, counts = drawn.unique(dim=0, return_counts=True)
    return columns, counts.to(FLOAT)


def gauss_beta(order: int, a: float) -> tuple[Tensor, Tensor]:
    """Compute nodes and weights for the expectation under Beta(a, 1), exact for polynomials below degree 2 order.

    By Golub & Welsch 1969 from the recurrence of Jacobi's polynomials on [0, 1] with the weight x^(a - 1).
    """
    b, k = a - 1, torch.arange(order, dtype=FLOAT)
    diagonal = 0.5 + 0.5 * b**2 / ((2 * k + b) * (2 * k + b + 2))
    diagonal[0] = a / (a + 1)  # the same, but for 0 / 0 at a = 1
    k = k[1:]
    beside = k * (k + b) / ((2 * k + b) * ((2 * k + b) ** 2 - 1).sqrt())
    nodes, vectors = torch.linalg.eigh(diagonal.diag() + beside.diag(1) + beside.diag(-1))
    return nodes, vectors[0] ** 2


def evidence_of_four(columns: Tensor, counts: Tensor, order: int) -> Tensor:
    r"""Integrate the branches of the three trees of four taxa by a tensor product of Gauss quadratures.

    In e = exp(-4 b / 3) the prior is Beta(3/4 rate, 1), and a column's probability is linear in each branch's e:
    the likelihood of N columns is a polynomial of degree N in each, which an order above N / 2 sums exactly. One
    inner branch joins two pairs of leaves, so the letters of a column meet in one product of matrices.

    Args:
        columns, counts: of the alignment, [P, 4] and [P].
        order: nodes for each branch.
    """
    nodes, weights = gauss_beta(order, 0.75 * RATE)
    letters = torch.eye(LETTERS, dtype=FLOAT)[columns]  # [P, 4 taxa, 4]
    leaf = along(nodes[:, None, None], letters)  # [order, P, 4 taxa, 4]
    pair_weights = (weights[:, None] * weights).log().flatten()
    of_trees = []
    for (a, b), (c, d) in topologies(4).tolist():
        other = c if d == 4 else d  # the leaf that is beside taxon 0
        pairs = [
            (leaf[:, None, :, one] * leaf[None, :, :, two]).flatten(0, 1).movedim(1, 0)  # [P, order^2, 4]
            for one, two in ((a, b), (0, other))
        ]
        same = pairs[0] @ pairs[1].mT / LETTERS  # [P, order^2, order^2]
        anew = pairs[0].mean(-1)[:, :, None] * pairs[1].mean(-1)[:, None]
        at_nodes = [torch.einsum("p,pij->ij", counts, (e * same + (1 - e) * anew).log()) for e in nodes]
        joint = torch.stack(at_nodes) + weights.log()[:, None, None] + pair_weights[:, None] + pair_weights
        of_trees.append(joint.flatten().logsumexp(0))
    return torch.stack(of_trees).logsumexp(0) - math.log(len(of_trees))


def evidence_by_sampling(columns: Tensor, counts: Tensor, *, draws: int, seed: int) -> tuple[float, float]:
    """Estimate log p(alignment) and its standard error by importance sampling, tree by tree."""
    log_means, errors = [], []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for children in topologies(columns.shape[1]):
            log_w = _weights_of_a_tree(children, columns, counts, draws)
            log_means.append(log_w.logsumexp(0) - math.log(draws))
            errors.append((log_w - log_means[-1]).exp().std() / math.sqrt(draws))
    means = torch.stack(log_means)
    error = (means.softmax(0) * torch.stack(errors)).square().sum().sqrt()
    return (means.logsumexp(0) - math.log(len(means))).item(), error.item()


def _weights_of_a_tree(children: Tensor, columns: Tensor, counts: Tensor, draws: int) -> Tensor:
    """Draw log p(alignment, b) - log r(b), [draws], from a proposal r that was fitted to earlier draws.

    Four in five draws are from a log-normal with the posterior moments of the round before, the others from the
    prior, so that no weight is more than five times the likelihood. Rounds before the last one only fit.
    """
    prior = dist.Exponential(torch.full((2 * columns.shape[1] - 3,), RATE, dtype=FLOAT)).to_event(1)
    fitted, share = prior, 0.2
    for number in (draws // 2, draws // 2, draws):
        few = int(share * number)
        b = torch.cat([fitted.sample((number - few,)), prior.sample((few,))])
        parts = fitted.log_prob(b) + math.log(1 - share), prior.log_prob(b) + math.log(share)
        log_likelihood = (JukesCantor(children, b[:, None]).log_prob(columns) * counts).sum(-1)
        log_w = log_likelihood + prior.log_prob(b) - torch.logaddexp(*parts)
        weight, log_b = log_w.softmax(0)[:, None], b.log()
        loc = (weight * log_b).sum(0)
        scale = (weight * (log_b - loc) ** 2).sum(0).sqrt().clamp(min=0.3)  # a few draws may have all the weight
        fitted = dist.LogNormal(loc, scale).to_event(1)
    return log_w


def field(*, seed: int = 0) -> Field:
    """Four taxa, three trees: the evidence is exact."""
    columns, counts = alignment(4, seed)
    order = COLUMNS // 2 + 1
    exact, again = (evidence_of_four(columns, counts, n).item() for n in (order, order + 1))
    how = (
        f"the branches of each of the 3 trees by Gauss-Jacobi quadrature of order {order} in exp(-4b/3), exact as "
        f"the likelihood is a polynomial of degree {COLUMNS}; order {order + 1} differs by "
        f"{abs(exact - again):.0e} nats"
    )
    return Field(Phylogeny(4), Trees(4), (columns, counts), (), "topology", exact, 0.0, how, False)


def five_taxa(*, seed: int = 0) -> Field:
    """Five taxa, fifteen trees: the evidence is an estimate."""
    columns, counts = alignment(5, seed)
    draws = 10_000
    estimate, error = evidence_by_sampling(columns, counts, draws=draws, seed=seed)
    how = f"importance sampling, {draws:,} draws of the branches for each of the 15 trees"
    return Field(Phylogeny(5), Trees(5), (columns, counts), (), "topology", estimate, error, how, False)
