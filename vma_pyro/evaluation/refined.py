"""Guides refined per datapoint: a better q for each image, at the price of some gradient steps for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from vma_pyro._system.whole import check_whole
from vma_pyro.evaluation.checks import BATCH_PLATES
from vma_pyro.evaluation.draws import trace_guide
from vma_pyro.evaluation.moved import Moved, unconstrained
from vma_pyro.infer import RLOO, log_weights
from vma_pyro.infer.engine.masks import without_mask
from vma_pyro.infer.engine.plates import Site, sample_sites

RATE = 0.03  # of Adam, in units of unconstrained latents
PARTICLES = 4  # draws behind each step
JUDGED = 32  # draws by which it is seen where the refinement has won something
MOST = 8.0  # of a log factor, which no sensible guide is off by


class Correction(NamedTuple):
    """What is added to a site's draws, and what they are multiplied by, where they are unconstrained.

    Attributes:
        shift, log_factor: [*batch, *event], of the site without draws side by side.
        data: which dimension of these, from the right, is that of the datapoints.
    """

    shift: Tensor
    log_factor: Tensor
    data: int


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
    training), of which discrete latents that depend on z have the score-function part. Where it has won nothing,
    by draws of its own, they are zero again. Whatever they are, it is a guide: every bound with it is a lower one.

    Sites with a mask in their distribution, and distributions that do not say where their draws lie, stay as they
    are.

    Args:
        model, guide: programs of (memory, x).
        memory, x: what they take; the guide returned is of these alone.
        steps: of Adam, at least 1.
        nesting: number of plate dimensions of the programs, see `nesting_of`.
        particles: draws behind each step.
        learning_rate: of Adam, in units of unconstrained latents.

    Raises:
        ValueError: no latent site of the guide can be refined, draws at the edge of a support, inference mode.
    """
    check_whole("refine", steps)
    if torch.is_inference_mode_enabled():
        raise ValueError("refine: expected gradients, which there are none of under torch.inference_mode, got it")
    corrections, is_followed = _corrections(guide, memory, x)

    def corrected(*args: Any, **kwargs: Any) -> Any:
        with _Corrected(corrections):
            return guide(*args, **kwargs)

    def minus_elbo() -> Tensor:
        if is_followed:
            elbo = RLOO(max(2, particles), max_plate_nesting=nesting)
            loss: Tensor = elbo.differentiable_loss(model, corrected, memory, x)
            return loss
        return -weights(corrected, particles).mean(0).sum()

    def weights(q: Callable[..., Any], number: int) -> Tensor:
        options: dict[str, Any] = {"max_plate_nesting": nesting, "pathwise": None}
        return log_weights(model, q, (memory, x), num_particles=number, **options)

    free = [tensor for c in corrections.values() for tensor in (c.shift, c.log_factor)]
    optimizer = torch.optim.Adam(free, learning_rate)
    for tensor in free:
        tensor.requires_grad_(True)
    for _ in range(steps):
        with torch.enable_grad():
            # Of the free numbers alone, whatever parameters the programs have.
            gradients = torch.autograd.grad(minus_elbo(), free, allow_unused=True)
        for tensor, gradient in zip(free, gradients, strict=True):
            tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        for correction in corrections.values():
            correction.log_factor.clamp_(-MOST, MOST)
    for tensor in free:
        tensor.requires_grad_(False)
        tensor.grad = None
    won = weights(corrected, JUDGED).mean(0) > weights(guide, JUDGED).mean(0)  # [*B]; False where there is NaN
    for correction in corrections.values():
        shape = [1] * correction.shift.dim()
        shape[correction.data] = len(won)
        for tensor in (correction.shift, correction.log_factor):
            tensor.copy_(torch.where(won.view(shape), tensor, 0.0))
    return corrected


class _Corrected(Messenger):
    """Corrects the draws of sites, inside of whatever puts draws side by side."""

    def __init__(self, corrections: dict[str, Correction]) -> None:
        super().__init__()
        self.corrections = corrections

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.corrections and not msg["is_observed"]:
            shift, log_factor, _ = self.corrections[msg["name"]]
            msg["fn"] = Moved(msg["fn"], shift, log_factor, name=msg["name"])


def _corrections(guide: Callable[..., Any], memory: Any, x: Tensor) -> tuple[dict[str, Correction], bool]:
    """Corrections without an effect of all latent sites that can have one; whether another follows the first."""
    latent = [
        s for s in sample_sites(prune_subsample_sites(trace_guide(guide, memory, x))) if not s["is_observed"]
    ]
    found: dict[str, Correction] = {}
    is_followed = False
    for site in latent:
        free, data = _free(site), _data_dim(site)
        if free is not None and data is not None:
            inner = free.dim() - (site["value"].dim() - len(site["fn"].event_shape))
            found[site["name"]] = Correction(torch.zeros_like(free), torch.zeros_like(free), data - inner)
        elif found and not _is_reparameterised(site):
            is_followed = True
    if not found:
        names = [site["name"] for site in latent]
        raise ValueError(
            f"refine: expected a reparameterised latent without a mask in the guide, found {_listed(names)}"
        )
    return found, is_followed


def _data_dim(site: Site) -> int | None:
    """The dimension of the datapoints in a site's batch, from the right."""
    return next((f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name in BATCH_PLATES), None)


def _is_reparameterised(site: Site) -> bool:
    fn: Any = without_mask(site["fn"])
    return bool(fn.has_rsample) or isinstance(fn, dist.Delta)


def _free(site: Site) -> Tensor | None:
    """The draw of a site where it is unconstrained; None where it cannot be moved."""
    fn: Any = site["fn"]
    if without_mask(fn) is not fn or not fn.has_rsample or isinstance(fn, dist.Delta):
        return None
    if hasattr(site["value"], "_unquantize"):  # a straight-through draw is not what its density is of
        return None
    return unconstrained(fn, site["value"])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
