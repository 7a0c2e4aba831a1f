"""A critic of the values of a discrete site, whose expectation is summed exactly, as a control variate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro.infer.estimator import Estimate
from vma_pyro.infer.handlers import Message, whole_support
from vma_pyro.infer.multi_sample import MultiSampleELBO
from vma_pyro.infer.plates import Program


class CriticELBO(MultiSampleELBO):
    r"""The multi-sample bound, with the learning signal of one discrete site compared with a critic's.

    .. math::
        \sum_k (L - c_k - \hat f(x, a_k)) \nabla \log q(a_k) + K \nabla \sum_a q(a) \hat f(x, a)

    The sum over all values needs the critic only, not the model. It is unbiased for every critic that does not
    see the particles (a control variate with known mean; Gu et al. 2016, MuProp; Tucker et al. 2017). The critic
    is trained to predict L - c_k, in the mean square.

    Args:
        num_particles: K.
        critic: module of the program's arguments with output [*batch, S], one value for each of the site's.
        site: name of the discrete site; its support is finite.
        options: those of `MultiSampleELBO` but `draws_per_score` and `chunk_size`.

    Raises:
        ValueError: a site without finite support; a critic of another shape.
    """

    def __init__(
        self, num_particles: int = 2, *, critic: nn.Module, site: str = "address", **options: Any
    ) -> None:
        super().__init__(num_particles, **options)
        if self.draws_per_score != 1 or self.chunk_size is not None or not self.vectorize_particles:
            raise ValueError("critic: expected all particles at once, one draw per score")
        self.critic, self.site = critic, site
        self._watch = _Watch(site)
        self._values = torch.zeros(0)

    def learned_parts(self) -> dict[str, nn.Module]:
        """The critic, and the baseline if it has parameters."""
        return {"critic": self.critic} | super().learned_parts()

    def _handlers(self, nesting: int) -> list[Any]:
        return [*super()._handlers(nesting), self._watch]

    def _estimate(self, model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> Estimate:
        self._values = self.critic(*args, **kwargs)  # [*batch, S]
        return super()._estimate(model, guide, args, kwargs)

    def _score_part(
        self, site: str, coefficient: Float[Tensor, "K B"], log_q: Float[Tensor, "K B"]
    ) -> Float[Tensor, ""]:
        if site != self.site:
            return super()._score_part(site, coefficient, log_q)
        log_probs = self._watch.log_probs  # [(K,) *batch, S]
        size = log_probs.shape[-1]
        if self._values.shape[-1] != size or self._values.numel() != coefficient.shape[1] * size:
            raise ValueError(
                f"critic: expected output [*batch, {size}], one value for each of site '{site}', "
                f"got {list(self._values.shape)}"
            )
        predicted = self._values.reshape(1, -1, size).expand(len(coefficient), -1, -1)  # [K, B, S]
        index = self._watch.index.reshape(len(coefficient), -1, 1)
        at_draw = predicted.gather(-1, index).squeeze(-1)  # [K, B]
        live = log_q != 0  # of a datapoint that is masked entirely nothing is learned
        probs = torch.where(live[..., None], log_probs.exp().reshape(len(coefficient), -1, size), 0.0)
        exact = (probs * predicted.detach()).sum()
        error = torch.where(live, coefficient - at_draw, 0.0)
        return ((coefficient - at_draw.detach()) * log_q).sum() + exact - (error**2).sum()


class _Watch(Messenger):
    """Remembers the distribution of one site, and which of its values was drawn."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] != self.site:
            return
        fn, value = msg["fn"], msg["value"]
        if not fn.has_enumerate_support:
            raise ValueError(f"site '{self.site}': expected a finite support, got {type(fn).__name__}")
        support = whole_support(fn)
        table = fn.log_prob(support).movedim(0, -1)  # [(K,) *batch, S]
        self.index = self._index(support, value, fn.event_dim)
        self.log_probs = table.expand(*self.index.shape, len(support)).log_softmax(-1)

    @staticmethod
    def _index(support: Tensor, value: Tensor, event_dim: int) -> Tensor:
        """Position of each value in the support [(K,) *batch]."""
        batch = value.dim() - event_dim
        event = support.shape[support.dim() - event_dim :]
        same = support.reshape(len(support), *(1 for _ in range(batch)), *event) == value
        for _ in range(event_dim):
            same = same.all(-1)
        return same.int().argmax(0)
