"""The approximate posterior. This is the file to edit: it mirrors model.py line by line."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.memory import Memory
from vma_pyro.networks import Networks
from vma_pyro.program import Program


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

        Whether images must be binary is for the model to say; entries on another scale than x are refused here.
        """
        memory = Memory.of(memory)
        memory.check(x)
        networks = self.networks  # once: Pyro registers all parameters whenever it is asked for a module
        memory = memory.encode(networks, x)
        query = networks.query(x)
        with pyro.plate("data", len(x), dim=-1):
            logits = memory.masked(self.similarity(query.key, memory.features.key))  # padding is no entry
            address = pyro.sample("address", dist.Categorical(logits=logits))  # q(a | x, M)
            m = memory.read(address)  # m_a
            pyro.sample("z", dist.Normal(*networks.posterior(query, m)).to_event(1))  # q(z | x, m_a)


class CosineSimilarity(Part):
    """s(u, v) = scale * cos(u - c, v - c), with the scale learned; bounded, so no address starts impossible.

    # Departs from the paper: c is the mean key of the memory, because untrained keys have nearly one direction.
    Without centring q(a | x) starts uniform, the decoder learns to do without the memory, and thousands of updates
    pass before it looks there.

    Args:
        scale: initial scale.
        centred: whether c is the mean key of the memory, or 0 as in the paper.
    """

    def __init__(self, *, scale: float = 10.0, centred: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.centred = centred

    def forward(self, query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
        """Logits [..., B, S] from [..., B, E] and [S, E] or [B, S, E]."""
        centre = keys.mean(-2, keepdim=True)  # [1, E] or [B, 1, E]; keys of padding leave it where it is
        return self.log_scale.exp() * inner(self.embed(query, centre.squeeze(-2)), self.embed(keys, centre))

    def embed(self, keys: Float[Tensor, "*any E"], centre: Float[Tensor, "*mean E"]) -> Float[Tensor, "*any E"]:
        """What the inner product compares, of keys of targets or entries; `centre` is the mean of the entries'."""
        return F.normalize(keys - centre if self.centred else keys, dim=-1)


class InnerProduct(Part):
    """s(u, v) = scale * <u, v>, with the scale learned."""

    def __init__(self, *, scale: float = 0.1) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
        """Logits [..., B, S] from [..., B, E] and [S, E] or [B, S, E]."""
        return self.log_scale.exp() * inner(query, keys)

    def embed(self, keys: Float[Tensor, "*any E"], centre: Float[Tensor, "*mean E"]) -> Float[Tensor, "*any E"]:
        """What the inner product compares: the keys themselves."""
        return keys


def inner(query: Float[Tensor, "*K B E"], keys: Float[Tensor, "*own S E"]) -> Float[Tensor, "*K B S"]:
    """Inner products [..., B, S], in float32 or better: a cosine rounded to bfloat16 ties entries."""
    with torch.autocast(query.device.type, enabled=False):
        if keys.dim() == 2:
            return query @ keys.T
        return torch.einsum("...be,bse->...bs", query, keys)
