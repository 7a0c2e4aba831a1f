"""A critic of the values of a discrete site, whose expectation is summed exactly, as a control variate."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vma_pyro.infer.engine.checks import check_batch_plates_only
from vma_pyro.infer.engine.distributions import whole_support
from vma_pyro.infer.engine.estimator import Estimate, Noise, PlateOptions
from vma_pyro.infer.engine.messages import check_no_own_mask
from vma_pyro.infer.engine.particles import SiteScore
from vma_pyro.infer.engine.pathwise import PathwiseRule, iwae
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.baselines import ScoreBaseline, vimco
from vma_pyro.infer.estimators.multi_sample import MultiSampleELBO


class CriticELBO(MultiSampleELBO):
    r"""The multi-sample bound, with the learning signal of one discrete site compared with a critic's.

    .. math::
        \sum_k (L - c_k - \hat f(x, a_k)) \nabla \log q(a_k) + K \nabla \sum_a q(a) \hat f(x, a)

    The sum over all values needs the critic only, not the model. It is unbiased for every critic that does not
    see the particles (a control variate with known mean; Gu et al. 2016, MuProp; Tucker et al. 2017). The critic
    is trained to predict L - c_k, in the mean square.

    Args:
        num_particles: K.
        critic: module of the program's arguments with output [*batch, S], one value for each of the site's;
            the batch plates in the order of `batch_plates`.
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
        noise: Noise = "independent",
        **plates: Unpack[PlateOptions],
    ) -> None:
        super().__init__(num_particles, baseline=baseline, pathwise=pathwise, noise=noise, **plates)
        for name, needed in (("draws_per_score", 1), ("chunk_size", None), ("vectorize_particles", True)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name}: expected {needed}, as the critic judges all particles at once, "
                    f"got {getattr(self, name)}"
                )
        self.critic, self.site = critic, site
        self._values, self._met = torch.zeros(0), False

    def learned_parts(self) -> dict[str, nn.Module]:
        """The critic, and the baseline if it has parameters."""
        return {"critic": self.critic} | super().learned_parts()

    def _estimate(self, programs: Programs) -> Estimate:
        args, kwargs = programs.as_given
        self._values = self.critic(*args, **kwargs)  # [*batch, S]
        self._met = False
        try:
            estimate = super()._estimate(programs)
        finally:
            args, kwargs = programs.as_given
        self._values = torch.zeros(0)  # an objective with a graph in it could not be copied
        if not self._met:
            raise ValueError(
                f"site '{self.site}': expected among the guide's sites that are not reparameterised, found none"
            )
        return estimate

    def _surrogate_of(
        self, score: SiteScore, coefficient: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]
    ) -> Float[Tensor, ""]:
        if score.name != self.site:
            return super()._surrogate_of(score, coefficient, log_q)
        self._met = True
        log_probs, drawn = _table(score)  # [S, K, B], [K, B]
        size = len(log_probs)
        if self._values.shape[-1] != size or self._values.numel() != coefficient.shape[1] * size:
            raise ValueError(
                f"critic: expected output [*batch, {size}], one value for each of site '{self.site}', "
                f"got {list(self._values.shape)}"
            )
        predicted = self._values.reshape(-1, size).T[:, None].expand(size, *coefficient.shape)  # [S, K, B]
        at_draw = predicted.gather(0, drawn[None]).squeeze(0)  # [K, B]
        live = log_q != 0  # of a datapoint that is masked entirely nothing is learned
        probs = torch.where(live, log_probs.exp(), 0.0)
        exact = (probs * predicted.detach()).sum()
        error = torch.where(live, coefficient - at_draw, 0.0)
        return ((coefficient - at_draw.detach()) * log_q).sum() + exact - (error**2).sum()


def _table(score: SiteScore) -> tuple[Float[Tensor, "S K B"], Int[Tensor, "K B"]]:
    """log q of all values of a site, and the positions of those that were drawn."""
    layout, site = score.layout, score.site
    fn, value = site["fn"], site["value"]
    if not getattr(fn, "has_enumerate_support", False):
        raise ValueError(f"site '{score.name}': expected a finite support, got {type(fn).__name__}")
    check_batch_plates_only(site, layout)
    check_no_own_mask(site)
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
