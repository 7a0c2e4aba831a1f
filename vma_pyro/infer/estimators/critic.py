"""A control variate: a critic of a discrete site's values, whose expectation is summed exactly."""

from __future__ import annotations

from typing import Unpack, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vma_pyro.infer.engine.checks import check_batch_plates_only
from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimate, PlateOptions
from vma_pyro.infer.engine.handlers import check_finite_support
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.baselines import ScoreBaseline, vimco
from vma_pyro.infer.estimators.k_sample_bound import KSampleBound, plain_surrogate


@final
class CriticELBO(KSampleBound):
    r"""The multi-sample bound, with the learning signal of one discrete site compared with a critic's.

    .. math::
        \sum_k (L - c_k - \hat f(x, a_k)) \nabla \log q(a_k) + K \nabla \sum_a q(a) \hat f(x, a)

    The sum over all values needs the critic only, not the model. It is unbiased for every critic that does not
    see the particles (Gu et al. 2016; Tucker et al. 2017). The critic learns to predict L - c_k, in mean square.

    Args:
        num_particles: K.
        critic: a module from the program's arguments to [*batch, S], one output for each value of the site; the
            batch plates in the order of `batch_plates`.
        site: name of the discrete site; its support is finite.
        baseline, pathwise, noise, batch_plates, max_plate_nesting, retain_graph: see `MultiSampleELBO`.

    Raises:
        ValueError: a site without finite support; a critic of another shape.
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        critic: nn.Module,
        site: str = "address",
        baseline: ScoreBaseline = vimco,
        pathwise: PathwiseRule = iwae,
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, baseline=baseline, pathwise=pathwise, **plates)
        for name, needed in (("draws_per_score", 1), ("vectorize_particles", True)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name}: expected {needed}, as the critic judges all particles at once, "
                    f"got {getattr(self, name)}"
                )
        self.critic, self.site = critic, site

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return the critic, and the baseline if it has parameters."""
        return {"critic": self.critic} | super().learned_parts()

    def _estimate(self, programs: Programs) -> Estimate:
        args, kwargs = programs.as_given
        judged = _Judged(self.site, self.critic(*args, **kwargs))
        particles = self._particles(programs, self._all_particles())
        estimate = self._estimate_with(programs, particles, judged.surrogate)
        if not judged.met:
            raise ValueError(
                f"site '{self.site}': expected among the guide's sites that are not reparameterised, found none"
            )
        return estimate


class _Judged:
    """A site, what the critic says of its values [*batch, S], and whether the site was met among the scores."""

    def __init__(self, site: str, values: Tensor) -> None:
        self.site, self.values, self.met = site, values, False

    def surrogate(
        self, score: SiteScore, coefficient: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]
    ) -> Float[Tensor, ""]:
        """Compute the surrogate of one site's score, with the critic's part in it at the judged site."""
        if score.name != self.site:
            return plain_surrogate(score, coefficient, log_q)
        self.met = True
        log_probs, drawn = _table(score)  # [S, K, B], [K, B]
        predicted = self._predicted(len(log_probs), coefficient.shape)  # [S, K, B]
        at_draw = predicted.gather(0, drawn[None]).squeeze(0)  # [K, B]
        live = log_q != 0  # of a datapoint that is masked entirely nothing is learned
        probs = torch.where(live, log_probs.exp(), 0.0)
        exact = (probs * predicted.detach()).sum()
        error = torch.where(live, coefficient - at_draw, 0.0)
        return ((coefficient - at_draw.detach()) * log_q).sum() + exact - (error**2).sum()

    def _predicted(self, size: int, shape: torch.Size) -> Float[Tensor, "S K B"]:
        """Expand what the critic says of all S = size values to the particles, of shape [K, B]."""
        if self.values.shape[-1] != size or self.values.numel() != shape[1] * size:
            raise ValueError(
                f"critic: expected output [*batch, {size}], one value for each of site '{self.site}', "
                f"got {list(self.values.shape)}"
            )
        return self.values.reshape(-1, size).T[:, None].expand(size, *shape)


def _table(score: SiteScore) -> tuple[Float[Tensor, "S K B"], Int[Tensor, "K B"]]:
    """Compute log q of all values of a site, and find the positions of those that were drawn."""
    layout, site = score.layout, score.site
    fn, value = site["fn"], site["value"]
    check_finite_support(site)
    check_batch_plates_only(site, layout)
    shape = score.log_prob.shape
    batch, event = value.dim() - fn.event_dim, tuple(fn.event_shape)
    rows, position = [], torch.zeros(shape, dtype=torch.long, device=value.device)
    for s, one in enumerate(whole_support(fn)):
        one = one.reshape((1,) * batch + event)
        log_prob = layout.per_datapoint(site, fn.log_prob(one))
        rows.append(log_prob.flatten(1).expand(shape))
        same = (value == one).reshape(*value.shape[:batch], -1).all(-1)
        position = position + s * layout.per_datapoint(site, same.long()).flatten(1)
    return torch.stack(rows), position
