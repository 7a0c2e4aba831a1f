"""Ways to make one parameter update: ours, through Pyro, and the same mathematics by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pyro.infer.elbo import ELBO
from reference import ByHand, DefaultLayout, Reencoding
from torch import nn
from update import captured, updates

from vma_pyro import ConvNetworks, Guide, Model
from vma_pyro.data import Episode
from vma_pyro.infer import EnumeratedELBO, GraphELBO, MultiSampleELBO
from vma_pyro.training.loss import Loss

OURS, EVERY, HAND = "ours", "ours, Python in every update", "by hand"
OWN, REENCODING = "ours, a memory per query", "re-encoding every read"
PUBLIC = "re-encoding every read, default layout"
K, SIZE = 4, 32  # particles, |M|


class Contender(NamedTuple):
    """One way to make an update.

    Attributes:
        loss: of (memory, x), with the parameters that Adam moves.
        networks: whose gradients are compared.
        own_memory: whether every image has a memory of its own.
    """

    loss: Loss
    networks: ConvNetworks
    own_memory: bool = False

    @property
    def loss_fn(self) -> nn.Module:
        """Minus the bound, summed over images."""
        return self.loss.loss_fn

    def updates(self, rounds: Sequence[Episode]) -> Callable[[], None]:
        """One parameter update per call."""
        return updates(self.loss, rounds)


def contenders(width: float, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """What makes each contender, on networks of its own with the same initial weights."""

    def networks(kind: type[ConvNetworks] = ConvNetworks) -> ConvNetworks:
        torch.manual_seed(0)
        return kind(width=width).to(device)

    def ours(elbo: ELBO, own_memory: bool = False, kind: Callable[[nn.Module], Loss] = Loss) -> Contender:
        nets = networks()
        return Contender(kind(elbo(Model(nets), Guide(nets).to(device))), nets, own_memory)

    def by_hand() -> Contender:
        nets = networks()
        return Contender(Loss(ByHand(nets, num_particles=K).to(device)), nets)

    def reencoding(kind: type[ConvNetworks] = ConvNetworks) -> Contender:
        public = Reencoding(networks(kind), networks(kind), num_particles=K).to(device)
        return Contender(Loss(public), public.networks, own_memory=True)

    bound = MultiSampleELBO(K, max_plate_nesting=1)
    return {
        OURS: lambda: ours(bound, kind=captured if device.type == "cpu" else Loss),
        EVERY: lambda: ours(bound),
        HAND: by_hand,
        OWN: lambda: ours(bound, own_memory=True),
        REENCODING: reencoding,
        PUBLIC: lambda: reencoding(DefaultLayout),
        "TraceGraph_ELBO": lambda: ours(GraphELBO(K, vectorize_particles=True, max_plate_nesting=1)),
        "TraceEnum_ELBO": lambda: ours(EnumeratedELBO(1, max_plate_nesting=1)),
    }
