"""Ways to make one parameter update: ours, through Pyro, and the same mathematics by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO
from reference import ByHand, DefaultLayout, Reencoding
from torch import nn
from update import captured, updates

from vma_pyro import ConvNetworks, Guide, Model
from vma_pyro._system.processor import is_faster_in_bf16
from vma_pyro.data import Episode
from vma_pyro.infer import EnumeratedELBO, GraphELBO, MultiSampleELBO
from vma_pyro.training.compiled import Compiled
from vma_pyro.training.loss import Loss, bf16

OURS, COMPILED, EVERY = "ours", "ours, compiled", "ours, Python in every update"
HAND, SAME, SAME_COMPILED = "by hand, float32", "by hand, same precision", "by hand, same precision, compiled"
OURS32, OWN, REENCODING = "ours, float32", "ours, float32, a memory per query", "re-encoding every read"
PUBLIC = "re-encoding every read, default layout"
OURS16 = "ours, bfloat16"
K, SIZE = 4, 36  # particles, |M|


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


def contenders(
    width: float, device: torch.device, *, backend: str | None = None
) -> dict[str, Callable[[], Contender]]:
    """What makes each contender, on networks of its own with the same initial weights.

    Args:
        width: factor on the maps of the networks.
        device: where they run.
        backend: of `torch.compile`; its usual one by default.
    """

    def networks(kind: type[ConvNetworks] = ConvNetworks) -> ConvNetworks:
        torch.manual_seed(0)
        return kind(width=width).to(device)

    in_bf16: dict[str, Any] = {"autocast": partial(bf16, device)}
    mixed: dict[str, Any] = in_bf16 if is_faster_in_bf16(device) else {"autocast": nullcontext}

    def ours(elbo: ELBO, kind: Callable[[nn.Module], Loss] = Loss, own_memory: bool = False) -> Contender:
        nets = networks()
        return Contender(kind(elbo(Model(nets), Guide(nets).to(device))), nets, own_memory)

    def by_hand(kind: Callable[[nn.Module], Loss] = Loss) -> Contender:
        nets = networks()
        return Contender(kind(ByHand(nets, num_particles=K).to(device)), nets)

    def compiled(loss_fn: nn.Module) -> Loss:
        return Compiled(Loss(loss_fn, **mixed), backend=backend)

    def as_fit_makes_it(loss_fn: nn.Module, **precision: Any) -> Loss:
        return captured(loss_fn, **precision) if device.type == "cpu" else Loss(loss_fn, **precision)

    def reencoding(kind: type[ConvNetworks] = ConvNetworks) -> Contender:
        public = Reencoding(networks(kind), networks(kind), num_particles=K).to(device)
        return Contender(Loss(public), public.networks, own_memory=True)

    bound = MultiSampleELBO(K, max_plate_nesting=1)
    # What the processor is not said to be faster in: whether it is.
    other = {} if mixed is in_bf16 else {OURS16: lambda: ours(bound, partial(as_fit_makes_it, **in_bf16))}
    return {
        OURS: lambda: ours(bound, partial(as_fit_makes_it, **mixed)),
        COMPILED: lambda: ours(bound, compiled),
        EVERY: lambda: ours(bound, partial(Loss, **mixed)),
        HAND: by_hand,
        SAME: lambda: by_hand(partial(Loss, **mixed)),
        SAME_COMPILED: lambda: by_hand(compiled),
        OURS32: lambda: ours(bound, as_fit_makes_it),
        **other,
        OWN: lambda: ours(bound, own_memory=True),
        REENCODING: reencoding,
        PUBLIC: lambda: reencoding(DefaultLayout),
        "TraceGraph_ELBO, float32": lambda: ours(GraphELBO(K, vectorize_particles=True, max_plate_nesting=1)),
        "TraceEnum_ELBO, float32": lambda: ours(EnumeratedELBO(1, max_plate_nesting=1)),
    }
