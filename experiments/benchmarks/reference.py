"""What the program is compared with: the same mathematics in plain PyTorch, without Pyro.

`ByHand` is the fastest way known to us to write the update by hand: each entry is encoded once, and what
depends on the entry alone is read rather than computed again. `Reencoding` works as the public PyTorch
re-implementation of the paper does: every query has a memory of its own, an encoder of its own finds the keys, and
every entry that is read is encoded again. It is measured with our networks and with `DefaultLayout`, which leaves
images in torch's default layout as that implementation does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vma_pyro import ConvNetworks
from vma_pyro.memory import Memory
from vma_pyro.memory.reading import map_tensors
from vma_pyro.networks import Entry, Query, loc_and_scale


class DefaultLayout(ConvNetworks):
    """The same networks with channels first, as torch has them unless told otherwise."""

    up7: nn.Module
    up14: nn.Module
    up28: nn.Module
    conv7: nn.Module
    conv14: nn.Module
    conv28: nn.Module

    def __init__(self, *, width: float) -> None:
        super().__init__(width=width)
        self.to(memory_format=torch.contiguous_format)

    def climb(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the maps of layers 4 and 2, and the top of the pyramid."""
        maps = [images]
        layers: Any = self.pyramid
        for layer in layers:
            maps.append(F.relu_(layer(maps[-1])))
        return (maps[4].permute(0, 2, 3, 1), maps[2].permute(0, 2, 3, 1)), maps[6].flatten(1)

    def decode(self, z: Tensor, m: Entry) -> Tensor:
        """Logits, for as many z as entries."""
        skip7, skip14 = (s.flatten(0, -4).permute(0, 3, 1, 2) for s in m.skips)
        h = F.relu(self.stem(z) + m.stem).reshape(-1, *self.top_shape)
        h = F.relu_(self.conv7(F.relu_(self.up7(h))) + skip7)
        h = F.relu_(self.conv14(F.relu_(self.up14(h))) + skip14)
        h = F.relu_(self.conv28(F.relu_(self.up28(h))))
        return self.to_logits(h).reshape(*z.shape[:-1], *self.image_shape)


class ByHand(nn.Module):
    """Minus the multi-sample bound, summed over images; its gradient is VIMCO's.

    Args:
        networks: shared by both sides.
        num_particles: K.
    """

    def __init__(self, networks: ConvNetworks, *, num_particles: int) -> None:
        super().__init__()
        self.networks, self.num_particles = networks, num_particles
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, memory: Memory, x: Tensor) -> Tensor:
        """The loss of images [B, 1, 28, 28], with one memory for all of them."""
        return vimco_loss(self.networks, self.log_scale, memory.entries, x, num_particles=self.num_particles)


def vimco_loss(
    networks: ConvNetworks, log_scale: Tensor, entries: Tensor, x: Tensor, *, num_particles: int
) -> Tensor:
    """The loss of `ByHand`, with the logarithm of the scale of the cosine between keys."""
    K, B = num_particles, len(x)
    encoded, query = networks.encode(entries), networks.query(x)
    centre = encoded.key.mean(0, keepdim=True)
    keys = F.normalize(encoded.key - centre, dim=-1)
    log_q = (log_scale.exp() * (F.normalize(query.key - centre, dim=-1) @ keys.T)).log_softmax(-1)  # [B, S]
    a = torch.multinomial(log_q.detach().exp().expand(K, B, -1).flatten(0, 1), 1).view(K, B)
    m = read(networks.heads(encoded), a)
    loc, scale = posterior(networks, query, m)
    noise = torch.randn_like(loc)
    z = loc + scale * noise
    prior_loc, prior_scale = loc_and_scale(m.prior)
    log_q_z = (-0.5 * ((z - loc) / scale) ** 2 - scale.log()).sum(-1)
    log_p_z = (-0.5 * ((z - prior_loc) / prior_scale) ** 2 - prior_scale.log()).sum(-1)
    logits = networks.decode(z, m)
    log_p_x = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum((-3, -2, -1))
    log_q_a = log_q.expand(K, B, -1).gather(-1, a[..., None]).squeeze(-1)
    return vimco(log_p_x + log_p_z - math.log(len(entries)) - log_q_z - log_q_a, log_q_a)


def vimco(log_w: Tensor, log_q_a: Tensor) -> Tensor:
    """Minus log mean w, summed over images, with the gradient of the score; log_w and log_q_a are [K, B]."""
    K = len(log_w)
    bound = log_w.logsumexp(0) - math.log(K)
    with torch.no_grad():
        others = log_w.expand(K, K, -1).masked_fill(
            torch.eye(K, dtype=torch.bool, device=log_w.device)[..., None], -math.inf
        )
        signal = bound - (others.logsumexp(1) - math.log(K - 1))
    surrogate = bound.sum() + (signal * log_q_a).sum()
    return -(bound.detach().sum() + surrogate - surrogate.detach())


def posterior(networks: ConvNetworks, query: Query, m: Entry) -> tuple[Tensor, Tensor]:
    """Location and scale of q(z | x, m), each [..., Z]."""
    return loc_and_scale(networks.hidden_to_posterior(F.relu(query.hidden + m.hidden)))


def read(memory: Entry, a: Tensor) -> Entry:
    """Heads of the entries at addresses a [K, B]."""
    flat = a.flatten()

    def take(features: Tensor) -> Tensor:
        return features.index_select(0, flat).reshape(*a.shape, *features.shape[1:])

    return map_tensors(take, memory)


class Reencoding(nn.Module):
    """The bound as the public re-implementation computes it.

    Args:
        networks: as ours.
        key_networks: the second encoder, of keys alone.
        num_particles: K.
    """

    def __init__(self, networks: ConvNetworks, key_networks: ConvNetworks, *, num_particles: int) -> None:
        super().__init__()
        self.networks, self.key_networks, self.num_particles = networks, key_networks, num_particles
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, memory: Memory, x: Tensor) -> Tensor:
        """Minus the bound, summed over images that have a memory each."""
        networks, keys, entries = self.networks, self.key_networks, memory.entries
        B, S = entries.shape[:2]
        K = self.num_particles
        entry_key, query_key = (
            keys.to_key(keys.climb(images)[1]) for images in (entries.flatten(0, 1), x)
        )  # nothing but keys
        entry_key = entry_key.view(B, S, -1)
        similarity = F.cosine_similarity(query_key[:, None], entry_key, dim=-1)
        log_q = (self.log_scale.exp() * similarity).log_softmax(-1)
        a = torch.multinomial(log_q.detach().exp(), K, replacement=True).T  # [K, B]
        images = entries[torch.arange(B, device=a.device), a]  # [K, B, 1, 28, 28]
        flat = networks.heads(networks.encode(images.flatten(0, 1)))  # every read is encoded again
        m = map_tensors(lambda f: f.reshape(K, B, *f.shape[1:]), flat)
        query = networks.query(x)
        loc, scale = posterior(networks, query, m)
        z = loc + scale * torch.randn_like(loc)
        prior_loc, prior_scale = loc_and_scale(m.prior)
        log_q_z = (-0.5 * ((z - loc) / scale) ** 2 - scale.log()).sum(-1)
        log_p_z = (-0.5 * ((z - prior_loc) / prior_scale) ** 2 - prior_scale.log()).sum(-1)
        logits = networks.decode(z, m)
        log_p_x = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(
            (-3, -2, -1)
        )
        log_q_a = log_q.gather(-1, a.T).T
        return vimco(log_p_x + log_p_z - math.log(S) - log_q_z - log_q_a, log_q_a)
