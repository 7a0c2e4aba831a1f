"""Does the lookup need annealing? KL(a) over training with none, and with a temperature that falls.

Two runs alike but for q(a | x): one as it is, one whose logits are divided by a temperature that falls from
`temperature` to 1 over the first half of training, so that addresses are first drawn almost at random. The paper
trains without. Writes results.json, report.md and a picture.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import kept, plots, protocols, results
from common.several import Session, SeveralConfig, begin, small, train_one, training_episodes, validation_episodes
from common.train import TrainOptions, as_many
from vma_pyro import ConvNetworks, CosineSimilarity, Guide, Model, cli
from vma_pyro._system.markdown import table
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import Episode, Split
from vma_pyro.data.episodes import Episodes
from vma_pyro.evaluation import Mean, TwoPhase
from vma_pyro.models import Pair, on
from vma_pyro.training import TrainConfig


@dataclass(frozen=True)
class AnnealingConfig(SeveralConfig):
    """Train with and without a temperature schedule of the address."""

    out: Path = Path("runs/annealing")
    """Folder for the results. An earlier run in it is moved aside, never overwritten."""
    width: float = 0.25
    """Factor on the paper's 48 and 64 maps per convolution."""
    classes: int = 8
    """Classes in the memory."""
    shots: int = 4
    """Examples of each class in the memory."""
    temperature: float = 10.0
    """Temperature at the first update."""
    train: TrainOptions = field(default_factory=lambda: TrainConfig(updates=5000, log_every=25))
    """Training of each model."""

    def resolved(self) -> AnnealingConfig:
        """Fill in the tiny sizes, if they are wanted."""
        if self.train.updates is None:
            raise ValueError("updates: expected a budget in updates, as the temperature follows them, got none")
        return replace(self, **small(self), classes=2, shots=1) if self.tiny else self


class Tempered(nn.Module):
    """A similarity that is divided by a temperature in training, and left as it is in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity = CosineSimilarity()
        self.temperature = 1.0

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Logits of the address [..., B, S]."""
        logits: Tensor = self.similarity(query, keys)
        return logits / self.temperature if self.training else logits


class Falling:
    """Episodes, each of which sets the temperature of its update: down from `start` to 1 in geometric steps."""

    def __init__(self, episodes: Episodes, tempered: Tempered, start: float, updates: int) -> None:
        self.episodes, self.tempered, self.start, self.updates = episodes, tempered, start, updates
        self.drawn = 0

    def sample(self) -> Episode:
        """The next episode."""
        left = max(0.0, 1 - self.drawn / self.updates)
        self.tempered.temperature = self.start**left
        self.drawn += 1
        return self.episodes.sample()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        return {"episodes": self.episodes.state_dict(), "drawn": torch.tensor(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.episodes.load_state_dict(state["episodes"])
        self.drawn = int(state["drawn"])


def train(config: AnnealingConfig, name: str, data: Split, start: float) -> tuple[Pair, dict[str, Any]]:
    """Train one of the two models, or load it from an earlier run."""
    updates = config.train.updates or 0
    torch.manual_seed(config.train.seed)
    networks, tempered = ConvNetworks(config.latent_dim, width=config.width), Tempered()
    pair = Model(networks), Guide(networks, similarity=tempered)
    shape, shared = {"classes": config.classes, "shots": config.shots}, ("augment", "width", "latent_dim")
    facts = train_one(
        # As many updates for both; a temperature that changes cannot be recorded.
        replace(config, train=replace(as_many(config.train, updates), capture=False)),
        name,
        pair,
        Falling(training_episodes(config, data, **shape), tempered, start, updates // 2),
        validation=validation_episodes(config, data, **shape),
        identity={**shape, **{name: getattr(config, name) for name in shared}, "temperature": start},
    )
    return pair, facts


def score(pair: Pair, session: Session, config: AnnealingConfig) -> dict[str, Any]:
    """NLL of each test image under a memory as in training, and the share classified right."""
    device = session.device
    targets = partial(session.nested.episodes, config.classes, config.shots)
    share = protocols.accuracy(pair, targets(), device=device)
    return protocols.nll(pair, targets, config.samples, device=device).plain() | {"accuracy": share._asdict()}


def main(config: AnnealingConfig) -> None:
    """Train and test both models, and write."""
    config = config.resolved()
    session = begin(config)
    group = session.group()
    rows, scores = [], []
    for name, temperature in (("none", 1.0), ("temperature", config.temperature)):
        pair, facts = train(config, name, session.data, temperature)
        group.add(name, on(session.device, pair), facts)
        found = kept.once(config, f"{name}-scores", partial(score, pair, session, config))
        scores.append(TwoPhase.read(found))
        curve = read_metrics((config.load or config.out) / "models" / name / "metrics.jsonl")
        nll = scores[-1].estimate()._asdict()
        rows.append({"annealing": name, "nll": nll, "accuracy": found["accuracy"], "curve": curve})
    content = {
        **results.header(config, since=session.since, device=session.device, training=group.training),
        "log_memory": math.log(config.classes * config.shots),
        "rows": rows,
        "worse_without": scores[0].minus(scores[1]).estimate()._asdict(),
    }
    write(content, config)


def write(content: dict[str, Any], config: AnnealingConfig) -> None:
    """Write results.json, report.md and the picture."""
    names = {"none": "none", "temperature": f"temperature {config.temperature:g} to 1 over half of training"}
    lines = []
    for row in content["rows"]:
        seen = [line for line in row["curve"] if "kl_address" in line]
        halfway = next(
            (line["update"] for line in seen if line["kl_address"] > content["log_memory"] / 2), "never"
        )
        lines.append(
            [names[row["annealing"]], halfway, f"{seen[-1]['kl_address']:.2f}", Mean.read(row["nll"])]
            + [results.percent(Mean.read(row["accuracy"]))]
        )
    about = (
        f"{config.classes} classes x {config.shots} examples in memory, log |M| = "
        f"{content['log_memory']:.2f}; seed {config.train.seed}. "
        f"{config.samples.about(content['rows'][0]['nll']['n'])}"
    )
    head = ["annealing", "update at which KL(a) is half of log |M|", "KL(a) at the end", "NLL", "correct, %"]
    curves = {names[row["annealing"]]: row["curve"] for row in content["rows"]}
    training = results.Picture(
        f"{config.out.name}.png",
        "Bound, KL(a) and KL(z) in training",
        lambda path: plots.save_training(path, curves, log_memory=content["log_memory"]),
    )
    parts: list[str | results.Picture] = [about, table(head, lines), training]
    results.write(config.out, content, "No annealing needed", parts)


if __name__ == "__main__":
    cli.run(main, AnnealingConfig, __doc__)
