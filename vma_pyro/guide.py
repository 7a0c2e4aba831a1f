"""The approximate posterior. This is the file to edit: it mirrors model.py line by line."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from vma_pyro.memory import Memory
from vma_pyro.networks import Networks
from vma_pyro.program import Program
from vma_pyro.similarity import CosineSimilarity


class Guide(Program):
    r"""Find the entry that explains an image, then the variation of it.

    .. math:: q(a, z \mid x, M) = q(a \mid x, M) \, q(z \mid x, m_a), \qquad
              q(a \mid x, M) \propto \exp s(e(x), e(m_a))

    Bornschein et al. 2017, equation 4: an address is as probable as its entry's embedding is similar to x's. (The
    default similarity compares both after the memory's mean is taken off, see `CosineSimilarity`.)

    Args:
        networks: the embeddings e and q(z | x, m); the model's own object, to tie the pyramids.
        similarity: a module from keys of the targets [B, E] and of the entries [S, E] or [B, S, E] to the logits
            of q(a | x, M), [B, S]; a scaled cosine by default. It may ignore the memory's mask: what it says of
            padding is not looked at, and padding has the mean of the entries' keys.
    """

    def __init__(self, networks: Networks, *, similarity: nn.Module | None = None) -> None:
        super().__init__()
        self.networks = networks
        self.similarity = CosineSimilarity() if similarity is None else similarity

    def forward(self, memory: Memory | Tensor, x: Tensor) -> None:
        """Sample `address` and `z` for images x [B, 1, 28, 28]; the arguments are the model's.

        Which values images may have is for the model to say; entries on another scale than x are refused here.
        """
        memory, x, data = self.opened(memory, x)
        query = self.networks.query(x)
        with data:
            logits = memory.masked(self.similarity(query.key, memory.features.key))  # padding is no entry
            address = pyro.sample("address", dist.Categorical(logits=logits))  # q(a | x, M)
            m = memory.read(address)  # m_a
            pyro.sample("z", self.networks.posterior(query, m))  # q(z | x, m_a)
