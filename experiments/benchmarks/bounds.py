"""Figures of fixed seeds, compared with those of an earlier revision: what made the program faster changed none.

Run with the package of that revision first (`PYTHONPATH` of a worktree), then with `--against` its bounds.json.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from figures import BenchmarkConfig, write

from vma_pyro import ConvNetworks, Guide, MLPNetworks, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro.data import Episode, EpisodeSampler, glyphs
from vma_pyro.evaluation import log_likelihood
from vma_pyro.infer import BINARY, ESTIMATORS, MultiSampleELBO, make

TOLERANCE = 1e-4  # relative


@dataclass(frozen=True)
class BoundsConfig(BenchmarkConfig):
    """Compute losses, gradients and bounds with fixed seeds."""

    against: Path | None = None
    """The bounds.json of another revision; without it, figures are computed and not compared."""
    images: int = 20
    """Images per update and per bound."""
    updates: int = 10
    """Updates in training."""


def programs(kind: str) -> tuple[Model, Guide]:
    """Model and guide with initial weights."""
    torch.manual_seed(0)
    networks = ConvNetworks(8, width=0.25) if kind == "conv" else MLPNetworks(8)
    return Model(networks), Guide(networks)


def sampler(config: BoundsConfig, *, shared: bool) -> EpisodeSampler:
    """Episodes of 12 entries."""
    shape: dict[str, Any] = {"classes": 4, "shots": 3, "queries": config.images}
    return EpisodeSampler(glyphs.load(classes=40), **shape, seed=0, shared_memory=shared)


def trained(config: BoundsConfig, kind: str, *, shared: bool) -> dict[str, float]:
    """Losses of some updates, then a bound, nats per image."""
    model, guide = programs(kind)
    loss_fn = MultiSampleELBO(4)(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), 1e-3)
    episodes = sampler(config, shared=shared)
    name = f"{kind} networks, {'one memory' if shared else 'a memory per image'}"
    found = {}
    for update in range(config.updates):
        episode = episodes.sample()
        optimizer.zero_grad()
        loss = loss_fn(episode.memory, episode.x) / len(episode.x)
        loss.backward()
        optimizer.step()
        found[f"{name}: loss {update}"] = loss.item()
    episode = episodes.sample()
    bound = log_likelihood(model, guide, episode.memory, episode.x, num_samples=50)
    return found | {f"{name}: bound after {config.updates} updates": bound.mean().item()}


def estimated(name: str, episode: Episode) -> dict[str, float]:
    """An estimator's loss per image, and the length of its gradient."""
    loss_fn = make(name, 4)(*programs("mlp"))
    torch.manual_seed(1)
    loss = loss_fn(episode.memory, episode.x) / len(episode.x)
    loss.backward()
    gradients = [p.grad.double().flatten() for p in loss_fn.parameters() if p.grad is not None]
    return {f"{name}: loss": loss.item(), f"{name}: gradient": torch.cat(gradients).norm().item()}


def main(config: BoundsConfig) -> None:
    """Compute, compare and write.

    Raises:
        ValueError: a figure differs.
    """
    if config.tiny:
        config = replace(config, images=3, updates=2)
    found: dict[str, float] = {}
    for kind in ("conv", "mlp"):
        for shared in (True, False):
            found |= trained(config, kind, shared=shared)
    for name in (name for name in ESTIMATORS if name not in BINARY):
        found |= estimated(name, sampler(config, shared=True).sample())
    before = found if config.against is None else json.loads(config.against.read_text())["figures"]
    rows = [
        [name, f"{before[name]:.6f}", f"{value:.6f}", f"{abs(value / before[name] - 1):.0e}"]
        for name, value in found.items()
        if name in before
    ]
    parts = [
        f"Losses and bounds in nats per image, {config.images} images; gradients: length over all parameters.",
        table(["figure", "earlier revision" if config.against else "", "now", "relative difference"], rows),
    ]
    device = torch.device("cpu")
    write(config.output, "bounds", "Figures of fixed seeds", {"figures": found}, parts, device=device)
    worst = max(rows, key=lambda row: float(row[3]))
    if float(worst[3]) > TOLERANCE:
        raise ValueError(f"against: expected '{worst[0]}' to be {worst[1]} to {TOLERANCE:g}, got {worst[2]}")


if __name__ == "__main__":
    cli.run(main, BoundsConfig, __doc__)
