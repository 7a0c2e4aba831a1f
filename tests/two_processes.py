"""What one of several processes does in `test_several_processes.py`; started by torchrun, or called alone."""

import sys
from pathlib import Path

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import nn

from vma_pyro import AddressIndex, Guide, InvertedLists, LearnedAddress, MLPNetworks, Model
from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import read_metrics
from vma_pyro._system.ranks import Ranks
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.evaluation import large_log_likelihood
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training import TrainConfig, fit
from vma_pyro.training.processes import take_share
from vma_pyro.training.run import Run

QUERIES, ENTRIES = 6, 23


class DrawsOfImages(Messenger):
    """Draws that are functions of the image and of the particle, so that they do not depend on who draws."""

    def __init__(self, x):
        super().__init__()
        self.x, self.runs = x, 0

    def __enter__(self):
        self.runs += 1
        return super().__enter__()

    def _pyro_sample(self, msg):
        if msg["name"] not in ("address", "z"):
            return
        each = self.x.flatten(1).sum(1) + self.runs
        if msg["name"] == "address":
            msg["value"] = each.long() % msg["fn"].param_shape[-1]
        else:
            normal = msg["fn"].base_dist
            noise = torch.sin(each[:, None] * torch.arange(1, 1 + normal.loc.shape[-1]))
            msg["value"] = normal.loc + normal.scale * noise


class Deterministic(nn.Module):
    """A guide with such draws."""

    def __init__(self, guide):
        super().__init__()
        self.guide, self.draws = guide, {}

    def forward(self, memory, x):
        draws = self.draws.setdefault(x.shape[0], DrawsOfImages(x))
        with draws:
            self.guide(memory, x)


def programs(learned=False):
    torch.manual_seed(3)
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    prior = LearnedAddress(networks) if learned else None
    return Model(networks, address_prior=prior), Guide(networks)


def episodes(shared):
    options = {"classes": 4, "shots": 2, "queries": QUERIES, "seed": 0, "shared_memory": shared}
    return EpisodeSampler(glyphs.load(classes=30), **options)


def gradients(folder, shared):
    """Of one update, from this process's share of the images and averaged over all."""
    model, guide = programs()
    elbo = MultiSampleELBO(3, vectorize_particles=False, max_plate_nesting=1)
    config = TrainConfig(updates=1, accelerator="cpu")
    run = Run(model, Deterministic(guide), elbo, episodes(shared), config, folder / "unused")
    episode = take_share(run.episodes.sample(), run.ranks)
    run.fabric.backward(run.loss_fn(episode.memory, episode.x) / len(episode.x))
    return {name: p.grad for name, p in run.bare.named_parameters()}


def trained(folder, updates, *, resume=False, session_minutes=None):
    """Weights after some updates."""
    model, guide = programs()
    config = TrainConfig(
        updates=updates,
        session_minutes=session_minutes,
        accelerator="cpu",
        validate_every=3,
        validation_samples=2,
        log_every=2,
    )
    held_out = [episodes(True).sample() for _ in range(3)]
    elbo = MultiSampleELBO(3, max_plate_nesting=1)
    options = {"config": config, "folder": folder, "validation": held_out, "resume": resume}
    result = fit(model, guide, elbo, episodes(True), show_progress=False, **options)
    return {
        "weights": elbo(model, guide).state_dict(),
        "nll": result.validation_nll,
        "updates": result.updates,
        "noise": checkpoint.load(folder / "checkpoint.pt")["rng"]["cpu"],
        "bounds": [line["bound"] for line in read_metrics(folder / "metrics.jsonl") if "bound" in line],
    }


def shared_out(ranks, **options):
    """An index that is shared out over the processes, in unequal shares, and queries."""
    model, guide = programs(learned=True)
    images = torch.rand(ENTRIES + 4, 1, 28, 28, generator=torch.Generator().manual_seed(0)).lt(0.2)
    entries, x = images[:ENTRIES], images[ENTRIES:].float()
    labels = torch.arange(ENTRIES)
    first = 9 if ranks.size > 1 else ENTRIES  # unequal shares
    mine = slice(0, first) if ranks.rank == 0 else slice(first, None)
    return AddressIndex.encode(model, guide, entries[mine], labels[mine], shared_out=True, **options), x


def addressed(ranks):
    """A memory shared out over the processes, and what it answers."""
    index, x = shared_out(ranks)
    top = index.top(x, 12)
    return {
        "size": index.size,
        "address": top.address,
        "log_prob": top.log_prob,
        "labels": index.part(top.address).labels,
        "entries": index.part(top.address).entries,
        "log_prior": index.log_prior(top.address),
        "drawn": index.sample(x, 300).address,
        "drawn_prior": index.sample_prior(300),
        "bound": large_log_likelihood(index, x, num_samples=500, top=ENTRIES),
        "sampled_bound": large_log_likelihood(index, x, num_samples=500),
    }


def looked_up(ranks):
    """The same memory in inverted lists: fewer are looked into than hold entries of both processes."""
    search = InvertedLists(nlist=4, nprobe=2, support=11)
    found = {}
    for key_dtype in (torch.float32, None):
        index, x = shared_out(ranks, search=search, key_dtype=key_dtype)
        top = index.top(x, 11)
        index.kept.save(Path(f"lists-{ranks.rank}.pt"))
        again = AddressIndex.load(Path(f"lists-{ranks.rank}.pt"), index.model, index.guide, shared_out=True)
        found[key_dtype] = {
            "address": top.address,
            "again": again.top(x, 11).address,
            "log_prob": top.log_prob,
            "labels": index.part(top.address).labels,
            "log_prior": index.log_prior(top.address),
            "drawn": index.sample(x, 300).address,
            "bound": large_log_likelihood(index, x, num_samples=500, top=11),
        }
    return found


def everything(folder):
    pyro.settings.set(module_local_params=True)
    torch.set_num_threads(1)
    ranks = Ranks.start()
    interrupted = folder / "interrupted"
    trained(interrupted, 8, session_minutes=1e-9)
    return {
        "shared": gradients(folder, True),
        "own": gradients(folder, False),
        "trained": trained(folder / "whole", 8),
        "resumed": trained(interrupted, 8, resume=True),
        "addressed": addressed(ranks),
        "looked_up": looked_up(ranks),
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = everything(out)
    torch.save(found, out / f"found-{Ranks.present().rank}.pt")
