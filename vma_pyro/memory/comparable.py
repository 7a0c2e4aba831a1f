"""Whether the address of two programs can be looked up by keys, seen on a memory of a few entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from vma_pyro._system.at_rest import at_rest
from vma_pyro.memory.memory import Memory

if TYPE_CHECKING:  # the programs are above; here they are only known by their parts
    from vma_pyro.guide import Guide
    from vma_pyro.model import Model

ENTRIES = 64  # of the small memory
TOLERANCE = 1e-3  # nats


@torch.no_grad()
def check_comparable(model: Model, guide: Guide, entries: Tensor) -> None:
    """Refuse programs whose address is not what an index computes, on some of the entries.

    An index takes q(a | x, M) for the softmax of `similarity.log_scale.exp()` times the inner product of the
    embedded keys, and p(a | M) for that of `address_prior`, which scores each entry by itself. A subclass may say
    otherwise.

    Raises:
        ValueError: another distribution of the address in either program, or a prior that mixes entries.
    """
    device = next(iter(guide.networks.parameters())).device
    spread = torch.linspace(0, len(entries) - 1, min(ENTRIES, len(entries))).long()
    memory = Memory(entries[spread].to(device).float())
    x = memory.entries[:: max(1, len(spread) // 4)]
    networks, similarity = guide.networks, cast("Any", guide.similarity)
    encoded = memory.encode(networks)
    keys = encoded.features.key
    centre = keys.mean(0)
    query = similarity.embed(networks.query(x).key, centre)
    by_keys = similarity.log_scale.exp() * query @ similarity.embed(keys, centre).T
    _compare("guide", "its similarity's", by_keys, _address_logits(guide, memory, x))
    prior = model.address_prior(encoded.encode(model.networks))
    _compare("model", "its address_prior's", prior, _address_logits(model, memory, x))
    alone = [model.address_prior(Memory(entry[None]).encode(model.networks)) for entry in memory.entries]
    _compare("model.address_prior", "a score of each entry by itself, its", torch.cat(alone), prior)


def _compare(name: str, whose: str, expected: Tensor, actual: Tensor) -> None:
    expected, actual = (logits.float().log_softmax(-1) for logits in (expected, actual))
    expected, actual = torch.broadcast_tensors(expected, actual)
    if not torch.allclose(expected, actual, rtol=TOLERANCE, atol=TOLERANCE):
        worst = (expected - actual).abs().max().item()
        raise ValueError(
            f"{name}: expected a site 'address' with {whose} logits, which an index computes by keys, got log "
            f"probabilities that differ by up to {worst:.2g}"
        )


def _address_logits(program: Callable[..., Any], memory: Memory, x: Tensor) -> Tensor:
    """Run a program for a look at its address; neither it nor any random stream is changed by that."""
    with at_rest(program), torch.random.fork_rng(), pyro.get_param_store().scope(), poutine.block():
        site = poutine.trace(program).get_trace(memory, x).nodes.get("address")
    logits = None if site is None else getattr(site["fn"], "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(program).__name__}: expected a categorical site 'address', found none")
    return logits
