"""Joint stochastic approximation: every datapoint has a Markov chain, whose proposals are the guide's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro.infer.engine.chains import Chains, Keep, Observed, tensors_in
from vma_pyro.infer.engine.estimator import Estimate, Estimator, PlateOptions
from vma_pyro.infer.engine.first_look import is_recorded
from vma_pyro.infer.engine.handlers import DetachValues
from vma_pyro.infer.engine.plates import Layout
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.engine.weights import finite, log_mean_exp, weighted


@final
class JSA(Estimator):
    r"""The marginal likelihood itself and the inclusive KL, by one Markov chain for each datapoint.

    .. math::
        \nabla_\theta = \nabla_\theta \log p(x, h), \qquad \nabla_\phi = \nabla_\phi \log q(h \mid x),
        \qquad h \leftarrow h' \text{ with probability } \min\Big(1, \frac{w(h')}{w(h)}\Big), \quad h' \sim q

    (Ou & Song 2020, joint stochastic approximation; Naesseth et al. 2020, Markovian score climbing.) Independence
    Metropolis leaves p(h|x) as it is, so a chain that has come to it gives the gradient of log p(x) (Fisher's
    identity) and minus that of KL(p(h|x) || q(h|x)), without bias for any K. **Until then it is biased**, by
    how far the chain is from the posterior. All latents are kept, continuous ones as well. No gradient passes
    through a draw. Both outcomes of a step enter the gradient with their probabilities.

    The last values of each datapoint are kept by its position in the data set, that of the batch plates:
    `pyro.plate("data", N, subsample=positions)`. They are in `elbo(model, guide).state_dict()`. They move when
    `loss_and_grads` or the module is called in training mode; `loss` does not use them. One objective is for one
    pair of programs.

    Args:
        num_particles: K steps, each with a proposal of its own; K + 1 runs of the model.
        batch_plates, max_plate_nesting, retain_graph: see `Estimator`.

    Raises:
        ValueError: data that change between draws in a plate that is not subsampled, as it is unknown then which
            datapoint is which; another size of the data set than before.
    """

    objective = "wake-sleep"
    unbiased = False
    _couples = False  # no gradient passes through the noise
    _differentiates_draws = False

    def __init__(self, num_particles: int = 2, **plates: Unpack[PlateOptions]) -> None:
        super().__init__(num_particles, **plates)
        if not self.vectorize_particles:
            raise ValueError(f"vectorize_particles: expected True for {type(self).__name__}, got False")
        self.chains = Chains()

    def learned_parts(self) -> dict[str, nn.Module]:
        """Return the chains."""
        return {"chains": self.chains}

    def _all_particles(self) -> int:
        return self.num_particles + 1

    def _estimate(self, programs: Programs) -> Estimate:
        if not torch.is_grad_enabled():
            particles = self._draw(programs, self.num_particles, handlers=[DetachValues()])
            return Estimate(log_mean_exp(particles.log_weights), torch.zeros(()), particles.scale)
        if is_recorded():
            raise RuntimeError("JSA: expected an update that is run, as values are kept from it, got one recorded")
        nesting = self._nesting(programs)
        keep, observed = Keep(self.chains, Layout(self.batch_plates, nesting)), Observed()
        watched = replace(programs, model=observed(programs.model))
        particles = self._draw(watched, self.num_particles + 1, handlers=[keep], nesting=nesting)
        if not keep.are_named and self.chains.training:
            arguments = dict(tensors_in(programs.as_given, "arguments"))
            self.chains.check_same_data(observed.values | arguments, self.batch_plates)
        log_w = particles.log_weights.detach()  # [K + 1, B]
        share, last = walk(log_w, self.uniform(log_w[1:]))
        if self.chains.training:
            # A datapoint that is masked entirely, such as padding, has learned nothing.
            rows = particles.live.any(0).nonzero().flatten()
            kept = {name: value[last[rows], rows] for name, value in keep.drawn.items()}
            self.chains.write(keep.rows.to(rows.device)[rows], keep.size, kept)
        surrogate = weighted(share, finite(particles.log_p) + finite(particles.log_q)).sum()
        return Estimate(log_mean_exp(log_w[1:]), surrogate, particles.scale)

    @staticmethod
    def uniform(like: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
        """Draw what decides the steps."""
        return torch.rand_like(like)


def walk(log_w: Float[Tensor, "K1 B"], u: Float[Tensor, "K B"]) -> tuple[Float[Tensor, "K1 B"], Any]:
    """Walk from state 0 through the proposals 1 to K.

    Returns:
        The mean share of each state in the expectations of the steps [K + 1, B], and the last state [B].
    """
    share, at = torch.zeros_like(log_w), torch.zeros_like(log_w[:1], dtype=torch.long)
    for k in range(1, len(log_w)):
        before = log_w.gather(0, at)
        # What weighs nothing is left at once, for something that weighs nothing as well.
        ratio = torch.where(before == -torch.inf, 0.0, log_w[k : k + 1] - before)
        accept = ratio.clamp(max=0.0).exp()
        share[k] += accept[0] / len(u)
        share.scatter_add_(0, at, (1 - accept) / len(u))
        at = torch.where(u[k - 1] < accept, k, at)
    return share, at[0]
