"""The guide of a memory of thousands: look for candidates by old keys, score those by fresh ones."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from vma_pyro._system.whole import check_whole
from vma_pyro.guide import Guide
from vma_pyro.memory import BankMemory, Encoded, Memory, Retrieved
from vma_pyro.networks import Networks, Query
from vma_pyro.proposal import DefensiveCategorical, check_share


class RetrievalGuide(Guide):
    r"""`Guide` on a memory of which an update encodes a few hundred entries, however large it is.

    .. math:: q(a \mid x, M) = (1 - \epsilon) \, \mathrm{softmax}_{P}\, s(e(x), e(m_a)) + \epsilon / |M|

    The entries whose kept keys are most similar to an image's are its candidates; those of all images together, P,
    are encoded, with gradients, and compared with every image by the keys that they have now. Any other entry is
    drawn with a probability of epsilon, and encoded when it is read. q is a proposal with exact probabilities: old
    keys make a bound looser, and nothing else.

    # Departs from the paper, which encodes all of M: retrieval with stale keys is REALM's (Guu et al. 2020), a
    # posterior over the best P with fresh scores VOD's (Lievin et al. 2023).

    With a memory that is of no `KeyedBank` it is `Guide` itself, over all entries: that is how to evaluate it.
    Objectives that enumerate addresses are right with a bank, and encode all of it. A sleep phase is right as
    well, and teaches q little: few of the addresses that are dreamed of are candidates.

    Args:
        networks, similarity: as of `Guide`; the similarity needs a method `embed`.
        candidates: P, entries that an update encodes.
        least: candidates of each image, if P should be too few for that; as many as particles, or more.
        share: epsilon, the share of draws from all of M.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        similarity: nn.Module | None = None,
        candidates: int = 512,
        least: int = 4,
        share: float = 0.01,
    ) -> None:
        super().__init__(networks, similarity=similarity)
        check_whole("candidates", candidates)
        check_whole("least", least)
        check_share(share)
        if not callable(getattr(self.similarity, "embed", None)):
            raise ValueError(
                "similarity: expected `embed`, so that an image is compared with keys that are kept, got "
                f"{type(self.similarity).__name__} without"
            )
        self.candidates, self.least, self.share = candidates, least, share

    def forward(self, memory: Memory | Tensor, x: Tensor) -> None:
        """Sample `address` and `z` for images x [B, 1, 28, 28]; the arguments are the model's."""
        memory, x, data = self.opened(memory, x)
        query = self.networks.query(x)
        with data:
            address = pyro.sample("address", self.proposal(memory, query))  # q(a | x, M)
            m = memory.read(address)  # m_a
            pyro.sample("z", self.networks.posterior(query, m))  # q(z | x, m_a)

    def proposal(self, memory: Encoded, query: Query) -> TorchDistribution:
        """q(a | x, M) by the fresh keys of what is encoded: of candidates, or of all entries."""
        if not isinstance(memory, Retrieved):
            return dist.Categorical(logits=memory.masked(self.similarity(query.key, memory.features.key)))
        logits = self.similarity(query.key, memory.candidates.key)  # [B, P]
        return DefensiveCategorical(
            logits, memory.addresses, memory.size, share=self.share, left_out=memory.left_out
        )

    def encoded(self, memory: Memory, x: Tensor | None) -> Encoded:
        """Encode the candidates of images x; with a gradient, their new keys replace the old ones."""
        if isinstance(memory, Retrieved):
            if memory.near is x and memory.is_of(self.networks):
                return memory
            memory = memory.memory
        if not isinstance(memory, BankMemory) or x is None:
            return memory.encode(self.networks)
        return self._retrieved(memory, x)

    def _retrieved(self, memory: BankMemory, x: Tensor) -> Retrieved:
        bank, training = memory.bank, torch.is_grad_enabled()
        by_keys = training and memory.is_searched(total=self.candidates, least=self.least, number=len(x))
        if by_keys:  # of a memory that is encoded whole no keys are kept
            bank.begin_update(self.networks, self.similarity)
        with torch.no_grad():
            query = self.networks.query(x.to(memory.dtype)).key
            addresses = memory.find(
                query, self.networks, self.similarity, total=self.candidates, least=self.least, fill=training
            )
        found = Retrieved(memory, self.networks, addresses, near=x)
        if by_keys:
            bank.replace(memory.rows_of(addresses), found.candidates.key, self.similarity)
        return found
