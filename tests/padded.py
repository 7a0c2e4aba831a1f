"""Memories of different sizes in one batch, and the exact terms of each datapoint on its own unpadded memory."""

import math

import pyro
import torch

from vma_pyro import Guide, LearnedAddress, Memory, MLPNetworks, Model

SIZES, S = (1, 2, 4, 6), 6


class WithoutNoise(MLPNetworks):
    """z plays no part, so that a weight is a function of the address alone."""

    def __init__(self):
        super().__init__(2, hidden_dims=(8, 7), key_dim=6)

    def posterior(self, query, m):
        prior = self.prior(m)
        return prior.expand((*prior.batch_shape[:-1], len(query.key)))

    def decode(self, z, m):
        return super().decode(torch.zeros_like(z), m)


def setting(networks=None, *, holes=False, **parts):
    """Model, guide, each datapoint's own memory, all of them padded with NaN, and the datapoints."""
    networks = networks or WithoutNoise()
    images = (torch.rand(len(SIZES), S, 1, 28, 28) < 0.3).float()
    labels = torch.arange(S).remainder(3).expand(len(SIZES), -1)
    mask = torch.arange(S) < torch.tensor(SIZES)[:, None]
    if holes:  # padding need not come last
        mask = torch.stack([row[torch.randperm(S)] for row in mask])
    own = [Memory(images[b, row], labels[b, row]) for b, row in enumerate(mask)]
    entries = torch.where(mask[..., None, None, None], images, math.nan)
    padded = Memory(entries, labels.where(mask, -7), mask=mask)
    prior = LearnedAddress(networks) if parts.pop("learned_prior", False) else None
    guide = Guide(networks, **parts)
    with torch.no_grad():
        guide.similarity.log_scale.fill_(1.0)
    return (
        Model(networks, address_prior=prior),
        guide,
        own,
        padded,
        (torch.rand(len(SIZES), 1, 28, 28) < 0.3).float(),
    )


def spread(values, mask):
    """Values of a memory's entries [n] at their places among S, and 0 elsewhere."""
    return torch.zeros(S, dtype=values.dtype).masked_scatter(mask, values)


def log_terms(model, guide, memory, x):
    """log p(x, a) and log q(a | x) of one datapoint under its own memory, [n] each, without the library's sums."""
    with torch.no_grad():
        guide_trace = pyro.poutine.trace(guide).get_trace(memory, x)
        log_q = guide_trace.nodes["address"]["fn"].logits[0].log_softmax(-1)
        log_p = []
        for a in range(memory.size):
            given = pyro.poutine.condition(model, data={"address": torch.tensor([a])})
            trace = pyro.poutine.trace(given).get_trace(memory, x)
            trace.compute_log_prob()
            log_p.append(trace.nodes["address"]["log_prob"] + trace.nodes["x"]["log_prob"])
    return torch.cat(log_p).double(), log_q.double()
