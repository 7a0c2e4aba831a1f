"""Guides refined per datapoint: a better q for each image, at the price of some gradient steps for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, Transform

from vma_pyro.evaluation.draws import trace_guide
from vma_pyro.infer import log_weights
from vma_pyro.infer.engine.masks import without_mask
from vma_pyro.infer.engine.plates import sample_sites

RATE = 0.03  # of Adam, in units of unconstrained latents
PARTICLES = 4  # draws behind each step


class Correction(NamedTuple):
    """What is added to a site's draws, and what they are multiplied by, where they are unconstrained.

    Attributes:
        shift, log_factor: [*batch, *event], of the site without draws side by side.
        constrain: from unconstrained values to the site's support; None where that is all real numbers.
    """

    shift: Tensor
    log_factor: Tensor
    constrain: Transform | None

    def applied(self, fn: Any) -> Any:
        """The distribution of corrected draws."""
        to = self.constrain
        event = len(fn.event_shape) if to is None else to.domain.event_dim
        factor, centre = self.log_factor.exp(), _centre(fn, to)
        affine = AffineTransform(centre + self.shift - factor * centre, factor, event_dim=event)
        return dist.TransformedDistribution(fn, [affine] if to is None else [to.inv, affine, to])


def _centre(fn: Any, constrain: Transform | None) -> Tensor | float:
    """Where draws lie, unconstrained, so that a factor leaves them there: at the mean if there is one, else 0."""
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        return 0.0
    return (mean if constrain is None else constrain.inv(mean)).nan_to_num(0.0, 0.0, 0.0)


def refined(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    memory: Any,
    x: Tensor,
    *,
    steps: int,
    nesting: int,
    particles: int = PARTICLES,
    learning_rate: float = RATE,
) -> Callable[..., Any]:
    r"""A guide whose reparameterised latents are corrected for each of these datapoints.

    .. math:: z = T\bigl(c + s + e^r \, (T^{-1}(z_0) - c)\bigr), \qquad z_0 \sim q(z \mid x, \dots)

    T leads from real numbers to the site's support, and c is the mean of q. So a diagonal Gaussian q(z | x, m)
    becomes one of image x alone, corrected in the same way for each m. Shift s and log factor r begin at zero, and
    follow the gradient of the single-sample ELBO (Kim et al. 2018, semi-amortised inference, without its share in
    training). Whatever they are, it is a guide: every bound with it is a lower bound still.

    Args:
        model, guide: programs of (memory, x).
        memory, x: what they take; the guide returned is of these alone.
        steps: of Adam.
        nesting: number of plate dimensions of the programs, see `nesting_of`.
        particles: draws behind each step.
        learning_rate: of Adam, in units of unconstrained latents.

    Raises:
        ValueError: no latent site of the guide is reparameterised.
    """
    corrections = _corrections(guide, memory, x)
    free = [t for c in corrections.values() for t in (c.shift, c.log_factor)]

    def corrected(*args: Any, **kwargs: Any) -> Any:
        with _Corrected(corrections):
            return guide(*args, **kwargs)

    optimizer = torch.optim.Adam(free, learning_rate)
    for tensor in free:
        tensor.requires_grad_(True)
    for _ in range(steps):
        with torch.enable_grad():
            log_w = log_weights(
                model, corrected, (memory, x), num_particles=particles, max_plate_nesting=nesting, pathwise=None
            )
            # Of the free numbers alone, whatever parameters the programs have.
            gradients = torch.autograd.grad(-log_w.mean(0).sum(), free)
        for tensor, gradient in zip(free, gradients, strict=True):
            tensor.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    for tensor in free:
        tensor.requires_grad_(False)
    return corrected


class _Corrected(Messenger):
    """Corrects the draws of sites, inside of whatever puts draws side by side."""

    def __init__(self, corrections: dict[str, Correction]) -> None:
        super().__init__()
        self.corrections = corrections

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.corrections and not msg["is_observed"]:
            msg["fn"] = self.corrections[msg["name"]].applied(msg["fn"])


def _corrections(guide: Callable[..., Any], memory: Any, x: Tensor) -> dict[str, Correction]:
    """Corrections without an effect, of all latent sites that can have one."""
    trace = prune_subsample_sites(trace_guide(guide, memory, x))
    found = {}
    for site in sample_sites(trace):
        fn: Any = site["fn"]
        if site["is_observed"] or without_mask(fn) is not fn or not _is_smooth(fn):
            continue
        constrain = _to_support(fn)
        value = site["value"] if constrain is None else constrain.inv(site["value"])
        found[site["name"]] = Correction(torch.zeros_like(value), torch.zeros_like(value), constrain)
    if not found:
        names = [site["name"] for site in sample_sites(trace) if not site["is_observed"]]
        raise ValueError(f"refine: expected a reparameterised latent in the guide, found {_listed(names)}")
    return found


def _is_smooth(fn: Any) -> bool:
    """Whether draws of a distribution can be moved: they have a density and a gradient."""
    return bool(fn.has_rsample) and not fn.support.is_discrete and not isinstance(fn, dist.Delta)


def _to_support(fn: Any) -> Transform | None:
    """From real numbers to a distribution's support; None where that is all real numbers."""
    plain = fn.support
    while isinstance(plain, constraints.independent):
        plain = plain.base_constraint
    if plain in (constraints.real, constraints.real_vector):
        return None
    transform: Transform = biject_to(fn.support)
    return transform


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
