r"""All changes of single values, and what a surrogate of f made from the other particles says of them.

.. math::
    u_k(y) = \tfrac1{K-1} \sum_{l \ne k} H(f_l, \, g_l \cdot (y - x_l)), \qquad
    (A u)(a) = \sum_d \Big[ \sum_s q_{ds} \, u(a_{d \to s}) - u(a) \Big]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.handlers import Message, is_drawn
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.estimators.double_cv import HardBernoulli, by_value, gradient_at


class Decisions(Messenger):
    """Notes which discrete sites differ between particles, and which came before one that does.

    These may decide the distribution of a later one. It stands inside the particle plate.
    """

    def __init__(self, max_plate_nesting: int) -> None:
        self.nesting = max_plate_nesting
        self.met: list[str] = []
        self.differing: set[str] = set()
        self.deciding: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        if not is_drawn(msg) or msg["fn"].has_rsample:
            return
        if len(msg["fn"].batch_shape) > self.nesting:
            self.differing.add(msg["name"])
            self.deciding.update(self.met)
        self.met.append(msg["name"])


@dataclass(frozen=True)
class SteinSite:
    """A site of D elements, which are bits (V = 1, the value on), or have one of V values.

    A move of an element is to another value: of a bit, to the only one (M = 1); else to any of all (M = V).

    Attributes:
        name: of the site.
        bits: whether the elements are bits.
        logits: with the gradient to the guide.
        q, x, g: probabilities, one-hot values, and the gradient of log w with respect to these.
        shared: whether all particles have the same distribution.
        changes: whether values may be changed with all others held fixed, as q is their distribution then.
    """

    name: str
    bits: bool
    logits: Float[Tensor, "K B D V"]
    q: Float[Tensor, "K B D V"]
    x: Float[Tensor, "K B D V"]
    g: Float[Tensor, "K B D V"]
    shared: bool
    changes: bool

    @classmethod
    def of(cls, score: SiteScore, log_w: Float[Tensor, "K B"], decisions: Decisions) -> SteinSite:
        """Differentiate log w with respect to the values of a site."""
        value, (fn, _) = score.site["value"], elementary(score.site["fn"])
        g = gradient_at(log_w, value)
        bits = isinstance(fn, HardBernoulli)
        size = 1 if bits else fn.logits.shape[-1]
        logits, x, g = (by_value(score, t, size) for t in (fn.logits, value.detach(), g))
        q = logits.detach().sigmoid() if bits else logits.detach().softmax(-1)
        logits = logits if bits else torch.where(logits > -torch.inf, logits, 0.0)
        name = score.name
        shared, changes = name not in decisions.differing, name not in decisions.deciding
        return cls(name, bits, logits, q, x, g, shared, changes)

    @property
    def h(self) -> Float[Tensor, "K B D V"]:
        """The gradient of log q(x) in the logits."""
        return self.x - self.q

    def steps(self, g: Float[Tensor, "K L B D V"]) -> Float[Tensor, "K L B D M"]:
        """Compute g . (y - x) for each move."""
        x = self.x[:, None]
        return g * (1 - 2 * x) if self.bits else g - (g * x).sum(-1, keepdim=True)

    def expected(
        self, there: Float[Tensor, "K B D M H"], here: Float[Tensor, "K B H"]
    ) -> Float[Tensor, "K B D H"]:
        """Compute the mean over the values of each element, all others held fixed."""
        if not self.bits:
            return (self.q[..., None] * there).sum(-2)
        chance = torch.where(self.x > 0, 1 - self.q, self.q)
        return torch.lerp(here[:, :, None], there.squeeze(-2), chance)

    def at_values(self, there: Float[Tensor, "K B D M"], here: Float[Tensor, "K B"]) -> Float[Tensor, "K B D V"]:
        """Compute what holds where each element has each value."""
        return torch.where(self.x > 0, here[..., None, None], there) if self.bits else there


class SteinControl(nn.Module):
    """alpha, beta and H, with the running mean and deviation of f, by which H sees it.

    Args:
        network: what H has beside its second argument; a module from [..., 2] to [..., 2]. None: one layer of 16.
    """

    mean: Tensor
    variance: Tensor
    known: Tensor

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        if network is None:
            last = nn.Linear(16, 2)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            network = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(), last)
        self.network = network
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("variance", torch.tensor(1.0))
        self.register_buffer("known", torch.tensor(False))

    def forward(self, f: Float[Tensor, "*S"], step: Float[Tensor, "*S"]) -> Float[Tensor, "*S 2"]:
        """Compute H(f, g . (y - x)): the step twice, and what the network adds."""
        scale = self.variance.sqrt().to(f).clamp_min(1e-6)
        seen = torch.stack([(f - self.mean.to(f)) / scale, step / scale], -1)
        first = next(self.network.parameters(), seen)
        added = self.network(seen.to(first.dtype)).to(f)
        if added.shape != seen.shape:
            raise ValueError(f"network: expected output {list(seen.shape)}, got {list(added.shape)}")
        return step[..., None] + scale * added

    @torch.no_grad()
    def remember(self, f: Float[Tensor, "K B"], live: Bool[Tensor, "K B"]) -> None:
        """Take f of this draw, seen by later ones, into the running mean and variance; in training mode only."""
        if self.training:
            count = live.sum().clamp_min(1)
            mean = (f * live).sum() / count
            variance = ((f - mean).square() * live).sum() / count
            weight = torch.where(self.known, 0.01, 1.0).to(mean)
            self.mean.lerp_(mean.to(self.mean), weight.to(self.mean))
            self.variance.lerp_(variance.to(self.mean), weight.to(self.mean))
            self.known.fill_(True)


class Changes:
    """u_k and U_k at the values of particle k and at all single changes of them.

    Attributes:
        of_u: (A u_k)(a_k), [K, B].
    """

    def __init__(self, here: Float[Tensor, "K B H"], there: dict[str, Tensor], sites: list[SteinSite]) -> None:
        self.here, self.there = here, there  # there: by site, at each move [K, B, D, M, H]
        self.expected = {s.name: s.expected(there[s.name], here) for s in sites if s.changes}  # [K, B, D, H]
        total = torch.zeros_like(here)
        for expected in self.expected.values():
            total = total + (expected - here[:, :, None]).sum(2)
        self.of_u, self.total = total.unbind(-1)

    @classmethod
    def of(
        cls,
        control: SteinControl,
        f: Float[Tensor, "K B"],
        sites: list[SteinSite],
        live: Bool[Tensor, "K B"],
    ) -> Changes:
        """Ask the other particles what they expect of each change."""
        others = torch.tensor([[o for o in range(len(f)) if o != k] for k in range(len(f))], device=f.device)
        f_l = f[others]  # [K, K-1, B]
        step = torch.zeros_like(f_l)
        for site in sites:
            step = step + (site.g[others] * (site.x[:, None] - site.x[others])).sum((-2, -1))
        here = torch.where(live[..., None], control(f_l, step).mean(1), 0.0)
        there = {}
        for site in sites:
            if site.changes:
                moved = step[..., None, None] + site.steps(site.g[others])  # [K, K-1, B, D, M]
                guessed = control(f_l[..., None, None].expand_as(moved), moved).mean(1)
                there[site.name] = torch.where(live[..., None, None, None], guessed, 0.0)
        return cls(here, there, sites)

    def of_scores(self, control: SteinControl, site: SteinSite) -> Float[Tensor, "K B D V"]:
        """Compute beta (A U_k h)(a_k) in the logits of a site: h changes with its own element alone."""
        total = self.total[..., None, None]
        if not site.changes:
            return control.beta.to(total) * total * site.h
        expected = self.expected[site.name][..., 1, None]  # [K, B, D, 1]
        own = site.q * (site.at_values(self.there[site.name][..., 1], self.here[..., 1]) - expected)
        return control.beta.to(total) * (site.h * (total - expected) + own)
