r"""Unrooted trees of a few taxa, and the probability of a column of their alignment (Jukes & Cantor 1969).

A tree of n taxa hangs from taxon 0: its inner nodes, n to 2n - 3, have two children each, and the last one is
below taxon 0. Branch c - 1 is the one above node c. Along a branch of length b (expected substitutions per site)
a letter

.. math::
    P_b(x \to y) = e \, [x = y] + (1 - e) / 4, \qquad e = \exp(-4 b / 3)

stays, or is drawn anew from all four. A column's probability sums over the letters of the inner nodes, from the
leaves up (Felsenstein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

LETTERS = 4
Tree = Any  # a leaf, or a pair of trees


def topologies(taxa: int) -> Tensor:
    """List the children [S, n - 2, 2] of the inner nodes of all S = (2n - 5)!! trees, from the leaves up."""
    trees: list[Tree] = [(1, 2)]
    for leaf in range(3, taxa):
        trees = [larger for tree in trees for larger in _with_leaf(tree, leaf)]
    return torch.tensor([_children(tree, taxa) for tree in trees])


def _with_leaf(tree: Tree, leaf: int) -> Iterator[Tree]:
    """Put a leaf on each branch in turn, that above the tree among them."""
    yield tree, leaf
    if isinstance(tree, tuple):
        left, right = tree
        yield from ((larger, right) for larger in _with_leaf(left, leaf))
        yield from ((left, larger) for larger in _with_leaf(right, leaf))


def _children(tree: Tree, taxa: int) -> list[list[int]]:
    """Number the inner nodes after their children."""
    found: list[list[int]] = []

    def number(node: Tree) -> int:
        if not isinstance(node, tuple):
            return int(node)
        found.append([number(child) for child in node])
        return taxa + len(found) - 1

    number(tree)
    return found


def along(kept: Tensor, letters: Tensor) -> Tensor:
    """Carry a function of the letter below a branch [..., 4] to the letter above: sum over y of P(x, y) f(y)."""
    e = kept[..., None]
    return e * letters + (1 - e) * letters.mean(-1, keepdim=True)


class JukesCantor(dist.TorchDistribution):
    """A column of an alignment: the letter, 0 to 3, of each taxon.

    Args:
        children: of the inner nodes [*B, n - 2, 2], as `topologies` lists them.
        branches: lengths [*B, 2n - 3].
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.integer_interval(0, LETTERS - 1), 1)

    def __init__(self, children: Tensor, branches: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(children.shape[:-2], branches.shape[:-1])
        self.children = children.expand(*batch, *children.shape[-2:])
        self.branches = branches.expand(*batch, -1)
        self.taxa = children.shape[-2] + 2
        super().__init__(batch, torch.Size([self.taxa]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> JukesCantor:
        """Repeat over more dimensions."""
        shape = torch.Size(batch_shape)
        children = self.children.expand(*shape, *self.children.shape[-2:])
        return JukesCantor(children, self.branches.expand(*shape, -1), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over the letters of the inner nodes: columns [*B, n] to [*B]."""
        n = self.taxa
        kept = (-4 / 3 * self.branches).exp()  # [*B, 2n - 3]
        leaf = F.one_hot(value, LETTERS).to(kept.dtype)  # [*B, n, 4]
        upward = [along(kept[..., c - 1], leaf[..., c, :]) for c in range(1, n)]
        for inner in range(n - 2):
            known = torch.stack(upward, -2)
            child = self.children[..., inner, :, None] - 1
            below = known.take_along_dim(child.expand(*known.shape[:-2], 2, 1), -2)  # [*B, 2, 4]
            upward.append(along(kept[..., n - 1 + inner], below[..., 0, :] * below[..., 1, :]))
        return (leaf[..., 0, :] * upward[-1]).sum(-1).log() - math.log(LETTERS)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from taxon 0 down to the others."""
        n, shape = self.taxa, torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            children = self.children.expand(*shape, *self.children.shape[-2:])
            stays = torch.rand(*shape, 2 * n - 3) < (-4 / 3 * self.branches).exp()
            anew = torch.randint(LETTERS, (*shape, 2 * n - 2))
            letters = anew.clone()
            last = 2 * n - 3
            letters[..., last] = torch.where(stays[..., last - 1], letters[..., 0], anew[..., last])
            for inner in reversed(range(n - 2)):
                below = children[..., inner, :]
                above = letters[..., n + inner, None]
                drawn = torch.where(stays.gather(-1, below - 1), above, anew.gather(-1, below))
                letters.scatter_(-1, below, drawn)
        return letters[..., :n]
