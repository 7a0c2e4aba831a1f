"""The report of the main job: what is measured of a trained model, written as soon as it is known."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import alike, plots
from main_job import page, scores
from main_job.options import FewShotConfig
from main_job.pictures import PICTURES
from vma_pyro import models
from vma_pyro._system.atomic import write_text
from vma_pyro._system.command import command
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import Split


class Report:
    """Measures a trained memory model, and writes its report.

    Args:
        config: all options.
        data: whose test classes are unseen.
        pair: model and guide, on the device.
        device: to measure on.
        start: of the job, on the monotonic clock.
        training: facts about each model that was trained here.
    """

    def __init__(
        self,
        config: FewShotConfig,
        data: Split,
        pair: models.Pair,
        device: torch.device,
        start: float,
        training: dict[str, Any],
    ) -> None:
        self.config, self.data, self.pair, self.device = config, data, pair, device
        self.start, self.training = start, training
        self.amounts = config.amounts()
        self.memoryless: torch.Tensor | None = None  # NLL of each image without memory
        self.no_gain = ""
        self.pictures: dict[str, str] = {}  # name to why it is not drawn; empty if it is

    def score(self) -> None:
        """Score the memory model."""
        self.scores = scores.score(self.pair, self.data.test, self.amounts, device=self.device)

    def compare(self, memoryless: models.Pair) -> None:
        """Score the memoryless model, and what the memory gains over it if both were trained alike."""
        test, amounts, device = self.data.test, self.amounts, self.device
        self.memoryless = scores.likelihood_scores(memoryless, test, amounts, device=device)
        example = scores.shared_episode(test, amounts).to(device)
        self.no_gain = alike.difference((self.pair, memoryless), self.facts(), example) or ""
        if self.no_gain:
            print(f"note: no gain over no memory is reported; {self.no_gain}")
        else:
            self.scores = scores.gained_over(memoryless, self.scores, test, amounts, device=device)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tell what is known of the training of both models, here or elsewhere."""
        if self.config.load is not None:
            return models.facts_of(self.config.load), models.facts_of(memoryless_beside(self.config.load))
        return self.training["memory"], self.training["memoryless"]

    def draw(self) -> None:
        """Draw what the model does, and write the pages with these pictures."""
        for name, picture in PICTURES.items():
            draw = partial(picture, self.pair, self.data.test, self.amounts, device=self.device)
            self.pictures[name] = plots.drawn(self.config.out / name, draw)
        self.write_pages()

    def write(self) -> None:
        """Write results.json and report.md, then training.png."""
        self.write_pages()
        folders = {"memory": self.config.out, "memoryless": self.config.out / "memoryless"}
        metrics = {name: folder / "metrics.jsonl" for name, folder in folders.items()}
        runs = {name: read_metrics(path) for name, path in metrics.items() if path.exists()}
        if runs:
            assert self.config.classes is not None  # resolved
            assert self.config.shots is not None
            most = math.log(self.config.classes * self.config.shots)
            draw = partial(plots.save_training, runs=runs, log_memory=most)
            self.pictures["training.png"] = plots.drawn(self.config.out / "training.png", draw)
        self.write_pages()

    def write_pages(self) -> None:
        """Write results.json and report.md, with the pictures that there are by now."""
        likelihood = models.likelihood_of(self.pair[0])
        about = page.About(
            command=command(),
            data=str(self.config.data),
            seconds=round(time.monotonic() - self.start, 1),
            device=self.device,
            seed=self.config.train.seed,
            training=self.training,
            config=asdict(self.config) | ({} if self.config.load is None else {"train": None}),
            amounts=self.amounts,
            no_gain=self.no_gain,
            pictures=self.pictures,
            likelihood=likelihood,
            dimensions=math.prod(self.data.test.image_shape) if likelihood.endswith("logistics") else None,
        )
        for name, render in (("results.json", page.to_json), ("report.md", page.to_markdown)):
            write_text(self.config.out / name, render(about, self.scores, self.memoryless))


def memoryless_beside(path: Path) -> Path:
    """Find the memoryless model's checkpoint, if it was trained with this one."""
    return path.parent / "memoryless" / path.name
