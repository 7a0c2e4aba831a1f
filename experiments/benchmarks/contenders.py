"""Ways to make one parameter update: ours, through Pyro, and the same mathematics by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pyro.infer.elbo import ELBO
from reference import DefaultLayout, Reencoding, vimco_loss
from torch import Tensor, nn
from update import captured_updates, updates

from vma_pyro import ConvNetworks, Guide, Model
from vma_pyro.data import Episode
from vma_pyro.infer import EnumeratedELBO, GraphELBO, MultiSampleELBO

OURS, EVERY, HAND = "ours", "ours, Python in every update", "by hand"
OWN, REENCODING = "ours, a memory per query", "re-encoding every read"
PUBLIC = "re-encoding every read, default layout"
K, SIZE = 4, 32  # particles, |M|


class Contender(NamedTuple):
    """One way to make an update.

    Attributes:
        loss: from an episode to minus the bound, summed over images.
        networks: whose gradients are compared.
        parameters: what Adam moves.
        own_memory: whether every image has a memory of its own.
        captured: what is recorded and replayed, or None.
    """

    loss: Callable[[Episode], Tensor]
    networks: ConvNetworks
    parameters: list[nn.Parameter]
    own_memory: bool = False
    captured: nn.Module | None = None

    def updates(self, rounds: Sequence[Episode]) -> Callable[[], None]:
        """One parameter update per call."""
        if self.captured is not None:
            return captured_updates(self.captured, rounds)
        return updates(self.loss, self.parameters, rounds)


def contenders(width: float, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """What makes each contender, on networks of its own with the same initial weights."""

    def networks(kind: type[ConvNetworks] = ConvNetworks) -> ConvNetworks:
        torch.manual_seed(0)
        return kind(width=width).to(device)

    def ours(elbo: ELBO, own_memory: bool = False, captured: bool = False) -> Contender:
        nets = networks()
        loss_fn = elbo(Model(nets), Guide(nets).to(device))
        parameters = list(loss_fn.parameters())
        return Contender(
            lambda e: loss_fn(e.memory, e.x), nets, parameters, own_memory, loss_fn if captured else None
        )

    def by_hand() -> Contender:
        nets, log_scale = networks(), nn.Parameter(torch.tensor(math.log(10.0), device=device))
        return Contender(
            lambda e: vimco_loss(nets, log_scale, e.memory.entries, e.x, num_particles=K),
            nets,
            [*nets.parameters(), log_scale],
        )

    def reencoding(kind: type[ConvNetworks] = ConvNetworks) -> Contender:
        public = Reencoding(networks(kind), networks(kind)).to(device)
        return Contender(
            lambda e: public(e.memory.entries, e.x, num_particles=K),
            public.networks,
            list(public.parameters()),
            own_memory=True,
        )

    bound = MultiSampleELBO(K, max_plate_nesting=1)
    return {
        OURS: lambda: ours(bound, captured=device.type == "cpu"),
        EVERY: lambda: ours(bound),
        HAND: by_hand,
        OWN: lambda: ours(bound, own_memory=True),
        REENCODING: reencoding,
        PUBLIC: lambda: reencoding(DefaultLayout),
        "TraceGraph_ELBO": lambda: ours(GraphELBO(K, vectorize_particles=True, max_plate_nesting=1)),
        "TraceEnum_ELBO": lambda: ours(EnumeratedELBO(1, max_plate_nesting=1)),
    }
