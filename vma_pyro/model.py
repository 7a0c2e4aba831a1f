"""The generative model. This is the file to edit: plain Pyro, in the order of the paper's equations."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from vma_pyro.memory import Memory
from vma_pyro.networks import Networks
from vma_pyro.priors import UniformAddress
from vma_pyro.program import ImageModel


class Model(ImageModel):
    r"""Generate an image by varying one entry of the memory.

    .. math:: p(x, z, a \mid M) = p(a \mid M) \, p(z \mid m_a) \, p(x \mid z, m_a)

    Bornschein et al. 2017, equation 3. Sites `address` (a, categorical), `z` (Gaussian) and `x` (an image), all in
    the plate `data` at dimension -1.

    Args:
        networks: p(z | m) and the decoder; share the object with the guide to tie the pyramids.
        address_prior: a module from a memory to the logits of p(a | M), [S] or [B, S]; uniform by default. It may
            ignore the memory's mask, as what it says of padding is not looked at.
        likelihood: a `Likelihood`, from what the decoder gives to p(x | z, m); `BernoulliPixels` by default.
    """

    def __init__(
        self, networks: Networks, *, address_prior: nn.Module | None = None, likelihood: nn.Module | None = None
    ) -> None:
        super().__init__(networks, likelihood=likelihood)
        self.address_prior = UniformAddress() if address_prior is None else address_prior

    def forward(self, memory: Memory | Tensor, x: Tensor | None = None, *, num_images: int = 1) -> Tensor:
        """Sample images, or score those given.

        Args:
            memory: entries [S, 1, 28, 28], or [B, S, 1, 28, 28] for one memory per image; binary, or what else the
                likelihood takes.
            x: observed images [B, 1, 28, 28] of the same kind; None to generate.
            num_images: B when generating from a shared memory.

        Returns:
            The images, [B, 1, 28, 28] with the dimensions of enclosing plates in front.
        """
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            logits = memory.masked(self.address_prior(memory))  # padding is no entry
            address = pyro.sample("address", dist.Categorical(logits=logits))  # p(a | M)
            m = memory.read(address)  # m_a
            z = pyro.sample("z", self.networks.prior(m))  # p(z | m_a)
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)  # p(x | z, m_a)
