"""Reference objectives, with the discrete sites summed exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimate, Estimator
from vma_pyro.infer.engine.handlers import CommonNoise, EnumerateValues, decide, is_open
from vma_pyro.infer.engine.log_weights import draw
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.programs import Programs

SUMMED = ("iwae", "iwae-coupled", "elbo", "exact", "distinct")  # objectives that are finite sums


class EnumeratedReference(Estimator):
    r"""An objective with all discrete sites of the guide summed exactly, and the others drawn.

    .. math::
        \sum_{a_1 \dots a_K} \prod_k q(a_k) \, \log \frac1K \sum_k w_k, \qquad \sum_a q(a) \log w, \qquad
        \log \frac1K \sum_k \sum_a q(a) w, \qquad
        \sum_{s' \notin C} \frac{q(s')}{1 - q_C} \log \Big[ \sum_{s \in C} q(s) w_s + (1 - q_C) w_{s'} \Big]

    the objectives "iwae" (and "iwae-coupled"), "elbo", "exact" and "distinct", as sums over the joint values a of
    the sites, with one draw of the reparameterised sites for each value and particle; C are the k - 1 most
    probable values. Autograd differentiates these sums: there is no score. Without reparameterised sites it is
    exact: every draw is the same. The cost is |support|^K sums and K |support| runs of the model.

    Args:
        num_particles: K, or k for "distinct".
        sites: names of the guide's discrete sites, in the order in which it draws them; see `find_sites`.
        objective: one of `SUMMED`; "elbo" is averaged over K draws of the reparameterised sites.
        draws_per_score: Z, particles that share the discrete values; their mean weight takes the place of w_k.
        by_value: run the programs once for each joint value, for programs that cannot take all values at once in
            dimensions of their own. For "iwae", "iwae-coupled" and "elbo".
        noise, batch_plates, max_plate_nesting, vectorize_particles: see `Estimator`.

    Raises:
        ValueError: probabilities of the values that do not sum to one.
    """

    objective = "iwae"
    unbiased = True

    def __init__(
        self,
        num_particles: int = 2,
        *,
        sites: Sequence[str],
        objective: str = "iwae",
        draws_per_score: int = 1,
        by_value: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, **options)
        if objective not in SUMMED:
            raise ValueError(f"objective: expected one of {', '.join(SUMMED)}, got {objective!r}")
        if by_value and objective in ("exact", "distinct"):
            raise ValueError(f"by_value: expected False, as the values meet inside {objective!r}, got True")
        self.sites, self.objective = tuple(sites), objective
        self.draws_per_score, self.by_value = draws_per_score, by_value

    def _estimate(self, programs: Programs) -> Estimate:
        tables = self._value_by_value if self.by_value else self._all_at_once
        table = tables(programs, self._nesting(programs))
        value = self._value(table)
        return Estimate(value.detach(), value.sum(), table.scale)

    def _value(self, table: _Table) -> Float[Tensor, " B"]:
        log_q, log_w = table.log_q, table.log_w
        if self.objective == "elbo":
            return (log_q.exp() * log_w).sum(0).mean(0)
        if self.objective == "exact":
            return table.joint.flatten(0, 1).logsumexp(0) - math.log(table.joint.shape[1])
        if self.objective == "distinct":
            return torch.where(table.live, _over_the_other(table, self.num_particles), 0.0)
        if self.draws_per_score > 1:
            groups = (log_w.shape[0], self.num_particles, self.draws_per_score, log_w.shape[-1])
            log_w = log_w.reshape(groups).logsumexp(2) - math.log(self.draws_per_score)
            log_q = log_q.reshape(groups)[:, :, 0]
        return _over_outcomes(log_w, log_q)

    def _particles(self) -> int:
        return 1 if self.objective == "distinct" else self.num_particles * self.draws_per_score

    def _all_at_once(self, programs: Programs, nesting: int) -> _Table:
        """Run the programs once, with the values of each site in a dimension of its own."""
        enumerated = [EnumerateValues(name, whole_support, nesting + 1 + i) for i, name in enumerate(self.sites)]
        particles = self._draw(programs, self._particles(), enumerated=enumerated, pathwise=None, nesting=nesting)
        shape = particles.log_weights.shape[-2:]
        log_q, joint = (t.reshape(-1, *shape) for t in (particles.log_q_enumerated, particles.log_weights))
        live = particles.live.reshape(-1, *shape).any(0).any(0)
        return _Table(log_q, joint - log_q, joint, live, particles.scale).checked(self.sites)

    def _value_by_value(self, programs: Programs, nesting: int) -> _Table:
        """Run the programs once for each joint value of the sites."""
        total = self._particles()
        noise = [CommonNoise(nesting)] if self.noise == "common" else []
        columns: list[list[Particles]] = []
        for size in [total] if self.vectorize_particles else [1] * total:
            earlier: dict[Any, Tensor] = {}
            sizes: dict[str, int] = {}
            runs: list[Particles] = []
            for values in _joint_values(self.sites, sizes):
                drawn = draw(
                    programs,
                    num_particles=size,
                    batch_plates=self.batch_plates,
                    max_plate_nesting=nesting,
                    pathwise=None,
                    linear=self.objective == "elbo",
                    handlers=[*noise, _OneValue(values, sizes, earlier)],
                )
                if not columns and not runs:  # all see the same datapoints
                    programs = programs.with_subsamples(drawn.subsamples)
                runs.append(drawn)
            columns.append(runs)
        log_q = torch.cat([torch.stack([p.score for p in runs]) for runs in columns], 1)  # [O, K, B]
        log_w = torch.cat([torch.stack([p.log_weights for p in runs]) for runs in columns], 1)
        first = columns[0][0]
        return _Table(log_q, log_w, log_q + log_w, first.live.any(0), first.scale).checked(self.sites)


class _Table(NamedTuple):
    """All joint values of the discrete sites [O, K, B]: log q, log w (0 where q is zero), log of q w."""

    log_q: Float[Tensor, "O K B"]
    log_w: Float[Tensor, "O K B"]
    joint: Float[Tensor, "O K B"]
    live: Tensor
    scale: float

    def checked(self, sites: Sequence[str]) -> _Table:
        """Refuse values whose probabilities do not sum to one."""
        total = self.log_q.detach().logsumexp(0)  # [K, B]
        off = torch.where(self.live, total, 0.0).abs().max().item()
        if not off < 1e-3:
            raise ValueError(
                f"site '{sites[0]}': expected probabilities that sum to one over the values of {list(sites)}, "
                f"got a logarithm of the sum of {off:.3g}"
            )
        # A value of probability zero counts nothing, whatever it weighs.
        return self._replace(log_w=torch.where(self.log_q > -math.inf, self.log_w, 0.0))


class _OneValue(Messenger):
    """Give the named sites one value each; draw others once for all runs that have the same values before them.

    `values` are positions in the supports, whose `sizes` are noted; `earlier` has the draws of earlier runs.
    """

    def __init__(self, values: dict[str, int], sizes: dict[str, int], earlier: dict[Any, Tensor]) -> None:
        self.values, self.sizes, self.earlier = values, sizes, earlier
        self.before: tuple[tuple[str, int], ...] = ()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["type"] != "sample" or not is_open(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if name in self.values:
            support = whole_support(fn)
            self.sizes[name] = len(support)
            value = support.reshape(len(support), *fn.event_shape)[self.values[name]]
            decide(msg, value.expand(fn.batch_shape + fn.event_shape).clone())
            self.before = (*self.before, (name, self.values[name]))
            return
        key = (name, self.before)
        if key not in self.earlier:
            self.earlier[key] = fn(*msg["args"], **msg["kwargs"])
        decide(msg, self.earlier[key])


def _joint_values(sites: Sequence[str], sizes: dict[str, int]) -> Any:
    """Go through all joint values; the sizes are known after the first."""
    yield dict.fromkeys(sites, 0)
    for values in itertools.islice(itertools.product(*(range(sizes[name]) for name in sites)), 1, None):
        yield dict(zip(sites, values, strict=True))


def _over_outcomes(log_w: Float[Tensor, "O K B"], log_q: Float[Tensor, "O K B"]) -> Float[Tensor, " B"]:
    """Sum over the joint values of all particles, one particle after the other."""
    K = log_w.shape[1]
    total, probability = log_w[:, 0], log_q[:, 0]  # [O, B]: log sum of weights, log probability
    for k in range(1, K):
        total = torch.logaddexp(total[:, None], log_w[None, :, k]).flatten(0, 1)
        probability = (probability[:, None] + log_q[None, :, k]).flatten(0, 1)
    return (probability.exp() * (total - math.log(K))).sum(0)


def _over_the_other(table: _Table, k: int) -> Float[Tensor, " B"]:
    """Sum over the value s' outside the k - 1 most probable ones."""
    log_q, log_w, joint = table.log_q[:, 0], table.log_w[:, 0], table.joint[:, 0]  # [O, B]
    if k > len(log_q):
        raise ValueError(f"num_particles: expected at most the {len(log_q)} values of the site, got {k}")
    top = torch.zeros_like(log_q, dtype=torch.bool).scatter(0, log_q.detach().topk(k - 1, dim=0).indices, True)
    inside = torch.where(top, joint, -math.inf).logsumexp(0)
    possible = ~top & (log_q > -math.inf)  # which s' can be drawn
    nothing = ~possible.any(0)  # outside of the top: they are certain
    outside = torch.where(possible, log_q, -math.inf)
    rest = torch.where(nothing, 0.0, torch.where(nothing, 0.0, outside).logsumexp(0))
    bound = torch.logaddexp(inside, rest + log_w)
    probability = torch.where(possible, (torch.where(possible, log_q, 0.0) - rest).exp(), 0.0)
    return torch.where(nothing, inside, (probability * bound).sum(0))
