"""How soon keys that are kept grow old: what a search by them finds of one by new keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn

from vma_pyro.data import LeaveOneOutSampler
from vma_pyro.memory import KeyedBank
from vma_pyro.memory.nearest import nearest
from vma_pyro.models import Pair
from vma_pyro.training import TrainConfig
from vma_pyro.training.optimizers import make_optimizer

TARGETS = 500  # of each comparison

Keys = tuple[Tensor, Tensor]  # of all entries, and their mean


def age(
    pair: Pair,
    elbo: ELBO,
    sampler: LeaveOneOutSampler,
    *,
    train: TrainConfig,
    number: int,
    begins: Sequence[int],
    ages: Sequence[int],
) -> list[dict[str, Any]]:
    """Train at a constant learning rate, and compare keys as they were with keys as they are.

    Muon begins where the first keys are made, after Adam as in every run.

    Args:
        pair: model and `RetrievalGuide`.
        elbo, sampler, train: what is trained on, and how.
        number: candidates of each image.
        begins: updates before keys are made that then grow old; at the next of them they are made again.
        ages: updates since.

    Returns:
        For each of `begins`, `updates`, and each `age`: `recall`, the share of the best candidates of an image
        that are found; `mass`, of q(a | x) over the best the share on those found; `moved`, the way of the mean.
    """
    model, guide = pair
    loss_fn = elbo(model, guide)
    optimizer = make_optimizer(train.optimizer, loss_fn, train.rate)
    rows = []
    for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
        wanted = [a for a in ages if begin + a < end]
        old: Keys | None = None
        while sampler.bank.updates <= begin + max(wanted):
            since = sampler.bank.updates - begin
            if since in wanted:
                old = _keys(guide, sampler.bank) if old is None else old
                rows.append({"updates": begin, "age": since, **compare(guide, sampler.bank, old, number)})
            episode = sampler.sample()
            for group in optimizer.param_groups:
                group["progress"] = float(sampler.bank.updates > begins[0])
            optimizer.zero_grad()
            (loss_fn(episode.memory, episode.x) / len(episode.x)).backward()
            nn.utils.clip_grad_norm_(loss_fn.parameters(), train.clip_norm)
            optimizer.step()
    return rows


@torch.no_grad()
def compare(guide: Any, bank: KeyedBank, old: Keys, number: int) -> dict[str, float]:
    """What a search by old keys finds of one by new ones; queries are embedded by the new mean, as in training."""
    similarity = guide.similarity
    (old_keys, before), (new, centre) = old, _keys(guide, bank)
    targets = torch.arange(0, len(new), max(1, len(new) // TARGETS))
    query = similarity.embed(guide.networks.query(bank.entries_at(targets)).key, centre)
    number = min(number, len(new) - 1)
    best, found = (nearest(query, keys, number, left_out=targets) for keys in (new, old_keys))
    hit = (best.unsqueeze(2) == found.unsqueeze(1)).any(2)
    scores = similarity.log_scale.exp() * torch.einsum("be,bne->bn", query, new[best].float())
    return {
        "recall": hit.float().mean().item(),
        "mass": (scores.softmax(1) * hit).sum(1).mean().item(),
        "moved": (centre - before).norm().item(),
    }


def _keys(guide: Any, bank: KeyedBank) -> Keys:
    return bank.keys_by(guide.networks, guide.similarity)
