r"""Pathwise rules: what the gradient through a reparameterised value z_k(phi) is weighted with.

The gradient of L = log 1/K sum_k w_k through z_k is v_k (d log w_k / d z_k) (d z_k / d phi) less v_k times the
score of q(z_k). The score has an expectation that can be written as another pathwise gradient; a rule says whether
it is left out (`detached`) and what factor makes up for it. With w detached in the parameters of q(z),

    sum_k v_k f_k (d log w_k / d z_k) (d z_k / d phi)

is the estimator, where f_k is a pure function of the normalised weight v_k = w_k / sum_l w_l and of s, the power
to which q(z_k) stands in w_k: 1, unless the site is scaled or masked.

The rules hold for a reparameterised site on which no other latent site of the guide depends; the others are
refused by name (they would need the generalised form of Bauer & Mnih 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vma_pyro.infer.plates import Layout, Site


class PathwiseRule(NamedTuple):
    """How gradients flow through reparameterised values.

    Attributes:
        name: for tables and errors.
        detached: whether the parameters of q(z) are held fixed inside log q(z).
        factor: f, from v and s (tensors that broadcast) to the factor on the gradient through z.
        unbiased: for K > 1, whether the expectation is the gradient of the bound.
    """

    name: str
    detached: bool
    factor: Callable[[Tensor, Tensor], Tensor]
    unbiased: bool


def _one(v: Tensor, s: Tensor) -> Tensor:
    return v.new_ones(())


def _doubly(v: Tensor, s: Tensor) -> Tensor:
    return 1 - s * (1 - v)


iwae = PathwiseRule("iwae", detached=False, factor=_one, unbiased=True)
"""The plain gradient of the bound, v_k (Burda et al. 2016, equation 13); its signal-to-noise ratio falls with
K.
"""

dreg = PathwiseRule("dreg", detached=True, factor=_doubly, unbiased=True)
"""Doubly reparameterised, v_k^2 for s = 1 (Tucker et al. 2018, equation 8); its SNR grows like sqrt(K)."""

stl = PathwiseRule("stl", detached=True, factor=_one, unbiased=False)
"""Sticking the landing, v_k (Roeder et al. 2017). Leaves the score out: biased for K > 1, unbiased for K = 1."""


class Gate:
    """The identity on a reparameterised value that multiplies the gradient through it by its rule's factor.

    The factor depends on the weights of all particles, which are known only after the model has run: it is set
    with `open`, before the backward pass.

    Args:
        site: of the guide.
        rule: its pathwise rule.
        layout: where the site's tensors hold particles and datapoints.
        power: s, broadcasts to the site's log probability.
    """

    def __init__(self, site: Site, rule: PathwiseRule, layout: Layout, power: Tensor) -> None:
        self.site, self.rule, self.layout, self.power = site, rule, layout, power
        self.factor: Tensor | None = None

    def pass_through(self, value: Tensor) -> Tensor:
        """The value, with the gate in its backward pass."""
        value = value.view_as(value)
        value.register_hook(self._multiply)
        return value

    def open(self, v: Tensor) -> None:
        """Set the factor from normalised weights [*S, K, *batch]."""
        self.factor = self.rule.factor(self.layout.spread(self.site, v), self.power)

    def _multiply(self, gradient: Tensor) -> Tensor:
        assert self.factor is not None, "open_gates comes before the backward pass"
        factor = self.factor.reshape(self.factor.shape + (1,) * self.site["fn"].event_dim)
        return (gradient * factor).reshape(gradient.shape)
