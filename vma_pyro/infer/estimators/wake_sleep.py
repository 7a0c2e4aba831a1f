"""Wake-sleep, one datapoint at a time: the model follows the bound, the guide the posterior."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import nn

from vma_pyro.infer.engine.defensive import Defensive
from vma_pyro.infer.engine.distributions import is_point
from vma_pyro.infer.engine.estimator import Estimate, Estimator, RunOptions
from vma_pyro.infer.engine.handlers import DetachValues
from vma_pyro.infer.engine.log_weights import guide_log_prob
from vma_pyro.infer.engine.particles import Particles
from vma_pyro.infer.engine.plates import is_given, is_random_subsample, sample_sites
from vma_pyro.infer.engine.programs import Handler, Programs, unwrapped
from vma_pyro.infer.engine.weights import finite, log_mean_exp, normalised, weighted


class WakeWake(Estimator):
    r"""Reweighted wake-sleep: no gradient passes through a sample, so discrete and continuous sites are alike.

    .. math::
        \nabla_\theta = \sum_k v_k \nabla_\theta \log p(x, h_k), \qquad
        \nabla_\phi = \sum_k (v_k - \tfrac1K) \nabla_\phi \log q(h_k \mid x), \qquad
        v_k = \frac{w_k}{\sum_l w_l}

    (Bornschein & Bengio 2015, equations 10 and 13; Le et al. 2018.) The model ascends the K-sample bound; the
    guide descends KL(p(h|x) || q(h|x)), estimated with self-normalised weights. There is no single objective, and
    the guide's gradient, a ratio of averages, is biased. Each datapoint has weights of its own (Pyro's
    `ReweightedWakeSleep` sums over the minibatch first).

    Args:
        num_particles: K, at least 2.
        centred: subtract 1/K, which changes no expectation and takes out much of the variance.
        insomnia: share of the wake update in the guide's gradient; the rest is sleep: E_p grad log q(h | x') on
            dreamed data x' (Hinton et al. 1995). Default 1: no sleep. 0 is wake-sleep.
        dreams: for sleep, the programs' argument that holds the data of each observed site; by default that of the
            site's name.
        defensive: share of a uniform distribution in the proposal of each discrete site with finite support (Le et
            al. 2018, section 4), so that no weight is unbounded. Default 0.
        batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: shares outside 0 to 1; an observed site for which the programs have no argument.
    """

    objective = "wake-sleep"
    unbiased = False
    min_particles = 2
    _couples = False  # no gradient passes through the noise
    _differentiates_draws = False

    def __init__(
        self,
        num_particles: int = 4,
        *,
        centred: bool = True,
        insomnia: float = 1.0,
        dreams: Mapping[str, str] | None = None,
        defensive: float = 0.0,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(num_particles, **options)
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia: expected 0 <= insomnia <= 1, got {insomnia}")
        if not 0 <= defensive < 1:
            raise ValueError(f"defensive: expected 0 <= defensive < 1, got {defensive}")
        self.centred, self.insomnia, self.dreams, self.defensive = centred, insomnia, dreams or {}, defensive

    def _estimate(self, programs: Programs) -> Estimate:
        handlers: list[Handler] = [Defensive(self.defensive)] if self.defensive else []
        handlers.append(DetachValues())
        particles = self._draw(programs, self.num_particles, handlers=handlers)
        v = normalised(particles.log_weights)  # [K, B]
        surrogate = weighted(v, particles.log_p).sum()
        if self.insomnia > 0:
            coefficient = v
            if self.centred:
                # The score has mean zero under q: draws from a wider proposal are weighted with q over it.
                ratio = (particles.log_q - particles.log_proposal).detach().exp()
                coefficient = v - ratio / self.num_particles
            surrogate = surrogate + self.insomnia * weighted(coefficient, finite(particles.log_q)).sum()
        if self.insomnia < 1:
            sleep = self._sleep(programs, particles)
            surrogate = surrogate + (1 - self.insomnia) * sleep.sum()
        return Estimate(log_mean_exp(particles.log_weights).detach(), surrogate, particles.scale)

    def _sleep(self, programs: Programs, particles: Particles) -> torch.Tensor:
        """Let the model dream, and return log q [1, B] of its dream, given the dreamed data."""
        self._check_can_dream(particles.draws[0])
        with torch.no_grad():
            unconditioned = poutine.uncondition(programs.model)
            dream = poutine.trace(unconditioned).get_trace(*programs.args, **programs.kwargs)
        if any(is_random_subsample(site) for site in dream.nodes.values()):
            raise ValueError("insomnia: expected 1 (no sleep) with randomly subsampled plates, got less")
        bound = self._dreamed_arguments(programs, dream)
        guide = poutine.replay(programs.guide, trace=dream)
        return guide_log_prob(guide, bound.args, bound.kwargs, particles.layout)

    def _check_can_dream(self, guide_trace: poutine.Trace) -> None:
        for site in sample_sites(guide_trace):
            where = ""
            if is_given(site):
                where = f"the value of site '{site['name']}' is given, as dreams have another"
            elif is_point(site["fn"]):
                where = f"site '{site['name']}' is a Delta, which gives a dream no density"
            if where:
                raise ValueError(f"insomnia: expected 1 (no sleep) where {where}, got {self.insomnia:g}")

    def _dreamed_arguments(self, programs: Programs, dream: poutine.Trace) -> inspect.BoundArguments:
        """Put dreamed data in the place of observed data in the arguments of the programs."""
        model, _ = unwrapped(programs.model)
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        bound = signature.bind(*programs.args, **programs.kwargs)
        for name in dream.stochastic_nodes:
            site: Any = dream.nodes[name]
            if site["infer"].get("was_observed") and not isinstance(site["fn"], Unit):
                argument = self.dreams.get(name, name)
                if argument not in bound.arguments:
                    raise ValueError(
                        f"dreams: expected the argument that holds the data of site '{name}', the model has "
                        f"{sorted(bound.arguments)}"
                    )
                bound.arguments[argument] = site["value"]
        return bound
