"""Continuous relaxations of discrete sites, for programs that can read softly; biased."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vma_pyro.infer.engine.coupled import CATEGORICAL, is_plain
from vma_pyro.infer.engine.distributions import elementary
from vma_pyro.infer.engine.estimator import Estimate, Estimator, RunOptions
from vma_pyro.infer.engine.handlers import Message, is_drawn
from vma_pyro.infer.engine.hard_reads import HardReads
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import log_mean_exp, normalised, weighted

# From log q [*B, S], normalised, and tau to weights over the values [*B, S] with a gradient in log q.
Relaxation = Callable[[Float[Tensor, "*B S"], float], Float[Tensor, "*B S"]]


def gumbel_softmax(log_q: Float[Tensor, "*B S"], temperature: float) -> Float[Tensor, "*B S"]:
    """Draw softmax((log q + g) / tau), g Gumbel noise (Jang et al. 2017; Maddison et al. 2017)."""
    return F.gumbel_softmax(log_q, temperature)


class RelaxedELBO(Estimator):
    r"""The multi-sample bound with discrete sites replaced by weights over their values.

    .. math::
        y_k = \mathrm{softmax}\big((\log q + g_k) / \tau\big), \quad g \sim \mathrm{Gumbel}, \qquad
        \log q(y) := \sum_a y_a \log q_a

    and its gradient through y; or another relaxation. With those of
    `vma_pyro.infer.estimators.straight_through` the program sees one-hot values, drawn from q, and only the
    gradient is that of something soft.

    **Biased, and no bound of log p(x)**: a program that reads softly is another program. An integer value [...]
    becomes a float tensor [..., S], which the program must be able to read, as `Memory.read` is. Those of a
    `OneHotCategorical` and of a `Bernoulli` keep their shape; a bit must be read as a number, too: a program
    that rounds it, or compares it (`b.long()`, `b == 1`), is refused where that is seen.

    Args:
        num_particles: K.
        site: name of the site, or names; None: all discrete sites. `Categorical`, `OneHotCategorical` or
            `Bernoulli`.
        temperature: tau; lower is closer to the discrete program, and noisier. Default 0.5.
        relaxation: `gumbel_softmax` (default), `gumbel_straight_through`, `straight_through`, `reinmax`,
            `GumbelRao()`, `GappedStraightThrough()`, or a function of your own.
        noise, batch_plates, max_plate_nesting, vectorize_particles, retain_graph: see `Estimator`.

    Raises:
        ValueError: temperature not above 0; no such site, or one of another family; another site that is not
            reparameterised.
    """

    objective = "relaxed"
    unbiased = False

    def __init__(
        self,
        num_particles: int = 2,
        *,
        site: str | Sequence[str] | None = "address",
        temperature: float = 0.5,
        relaxation: Relaxation = gumbel_softmax,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(num_particles, **options)
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        if not callable(relaxation):
            raise ValueError(f"relaxation: expected a function such as gumbel_softmax, got {relaxation!r}")
        self.sites = (site,) if isinstance(site, str) else None if site is None else tuple(site)
        self.temperature, self.relaxation = temperature, relaxation

    def _estimate(self, programs: Programs) -> Estimate:
        relax = Relax(self.sites, self.temperature, self.relaxation)
        # With a gradient, also where the loss alone is wanted: it shows what depends on weights.
        with relax.reading("RelaxedELBO"), HardReads(relax.weights), torch.enable_grad():
            # Plates are counted in the programs as they are: those under a handler are new each time.
            nesting = self._nesting(programs)
            particles = self._draw(programs.under(relax), self.num_particles, nesting=nesting)
        for name in self.sites or ():
            if name not in relax.met:
                raise ValueError(f"site '{name}': expected a categorical site in the guide, found none")
        for score in particles.scores:
            beside = "the relaxed ones" if self.sites is None else ", ".join(map(repr, self.sites))
            raise ValueError(
                f"site '{score.name}': expected a reparameterised site beside {beside}, got one that is not"
            )
        log_w = particles.log_weights
        surrogate = weighted(normalised(log_w), log_w).sum()
        return Estimate(log_mean_exp(log_w).detach(), surrogate, particles.scale)


class SoftCategorical(TorchDistribution):
    """Weights over the values of a categorical distribution [*batch, S]; see `RelaxedELBO`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, relaxation: Relaxation = gumbel_softmax) -> None:
        self.logits, self.temperature, self.relaxation = logits.log_softmax(-1), temperature, relaxation
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SoftCategorical:
        """Expand the weights to a larger batch."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return type(self)(logits, self.temperature, self.relaxation)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw weights by the relaxation."""
        return self.relaxation(self.logits.expand(*sample_shape, *self.logits.shape), self.temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute log q, linear in the weights; at one-hot values it is the categorical one.

        A value of probability zero counts nothing without weight (0 log 0 = 0, also in the gradient), and is
        impossible with weight.
        """
        impossible = self.logits == -torch.inf
        terms = value * torch.where(impossible, 0.0, self.logits)
        return torch.where(impossible & (value.detach() != 0), -torch.inf, terms).sum(-1)


class SoftBernoulli(TorchDistribution):
    """The weight [*batch] of "on", of the two values of a bit; see `RelaxedELBO`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, relaxation: Relaxation = gumbel_softmax) -> None:
        self.logits, self.temperature, self.relaxation = logits, temperature, relaxation
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SoftBernoulli:
        """Expand to a larger batch."""
        return type(self)(self.logits.expand(batch_shape), self.temperature, self.relaxation)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw by the relaxation of a categorical distribution over off and on."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        both = torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
        return self.relaxation(both, self.temperature)[..., 1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute log q, linear in the weight; at 0 and 1 it is that of a bit."""
        logits, value = torch.broadcast_tensors(self.logits, value)
        return -F.binary_cross_entropy_with_logits(logits, value, reduction="none")


def check_relaxable(msg: Message) -> None:
    """Refuse a site of a family that has no relaxation here, or that draws in a way of its own."""
    fn, _ = elementary(msg["fn"])
    if not isinstance(fn, (*CATEGORICAL, torch.distributions.Bernoulli)) or not is_plain(fn):
        instead = "; put the mask around it with poutine.mask" if isinstance(fn, MaskedDistribution) else ""
        raise ValueError(
            f"site '{msg['name']}': expected a Categorical, OneHotCategorical or Bernoulli to relax, got "
            f"{type(fn).__name__}{instead}"
        )


class Relax(Messenger):
    """Make discrete sites soft, in the model and in the guide: the named ones, or all."""

    categorical: type[SoftCategorical] = SoftCategorical
    bits: type[SoftBernoulli] = SoftBernoulli

    def __init__(self, sites: Sequence[str] | None, temperature: float, relaxation: Relaxation) -> None:
        self.sites, self.options = sites, (temperature, relaxation)
        self.met: set[str] = set()
        self.weights: dict[str, Tensor] = {}  # what was drawn
        self.families: dict[str, tuple[str, torch.Size]] = {}  # of the guide, which runs first
        self.integers: list[str] = []  # sites whose integer values are replaced

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or not self._is_meant(msg):
            return
        check_relaxable(msg)
        fn, inner = elementary(msg["fn"])
        soft = self.categorical if isinstance(fn, CATEGORICAL) else self.bits
        self.met.add(msg["name"])
        if isinstance(fn, torch.distributions.Categorical):
            self.integers.append(msg["name"])
        relaxed = soft(fn.logits, *self.options)
        msg["fn"] = relaxed.to_event(inner) if inner else relaxed
        self._check_same_family(msg["name"], type(fn).__name__, msg["fn"].event_shape)

    def _pyro_post_sample(self, msg: Message) -> None:
        if isinstance(msg["value"], Tensor) and msg["name"] in self.met:
            self.weights[msg["name"]] = msg["value"]

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Name the site where a program cannot read what stands in the place of an integer."""
        try:
            yield
        except (IndexError, TypeError, RuntimeError) as error:
            if not self.integers:
                raise
            raise ValueError(
                f"site '{self.integers[0]}': expected a program that reads weights [..., S] in the place of "
                f"integers, as {what} needs, got an error ({str(error).splitlines()[0]})"
            ) from error

    def _check_same_family(self, name: str, family: str, shape: torch.Size) -> None:
        """Refuse another family or size in the model than in the guide, where weights mean something else."""
        guide_family, guide_shape = self.families.setdefault(name, (family, shape))
        if (family, shape) != (guide_family, guide_shape):
            raise ValueError(
                f"site '{name}': expected the same family and size in model and guide to relax it, got "
                f"{family} {list(shape)} in the model and {guide_family} {list(guide_shape)} in the guide"
            )

    def _is_meant(self, msg: Message) -> bool:
        if self.sites is None:
            return is_drawn(msg) and not msg["fn"].has_rsample
        return msg["name"] in self.sites
