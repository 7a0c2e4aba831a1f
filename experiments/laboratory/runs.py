"""Training: all candidates with VIMCO's decoder evaluations; then VIMCO for longer, the best other in half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.kept import once
from common.timing import ratio, take_turns
from common.train import train_pair
from laboratory.findings import JUDGE, Training
from laboratory.options import Candidate, LaboratoryConfig, initial_pair, sampler
from vma_pyro._system.metrics import read_metrics
from vma_pyro.data import Episode, Split
from vma_pyro.evaluation import Mean, log_likelihood, split_bound, undisturbed
from vma_pyro.infer import make
from vma_pyro.infer.comparison.compare import evaluations_of
from vma_pyro.models import Pair
from vma_pyro.training import TrainConfig


def train(
    config: LaboratoryConfig,
    data: Split,
    folder: Path,
    candidate: Candidate,
    *,
    name: str,
    minutes: float | None = None,
    updates: int | None = None,
    label: str = "",
) -> tuple[Pair, Training]:
    """Train with one estimator, or go on with it.

    Args:
        config: what all runs share.
        data, name: what to train on, and what it is called.
        folder: of the run.
        candidate: who trains.
        minutes, updates: the budget.
        label: in front of the progress line; default: the estimator.

    Raises:
        Stopped: the run was told to stop, and has left a checkpoint.
    """
    pair = initial_pair(config)
    elbo = make(candidate.estimator, candidate.num_particles)
    held_out = sampler(config, data.validation, 4 if config.tiny else 32, seed=1)  # the same for all
    validation = [held_out.sample() for _ in range(2 if config.tiny else 8)]
    cost = evaluations_of(elbo, *pair, (validation[0].memory, validation[0].x))
    steps = TrainConfig(
        updates=updates,
        minutes=minutes,
        validate_every=6 if config.tiny else 250,
        log_every=1 if config.tiny else 50,
        validation_samples=8,
        optimizer="adam",  # as for the gradients that are measured
        learning_rate=candidate.learning_rate,
        patience=10**6,  # all are to use their whole budget
        seed=config.seed,
        accelerator="cpu",
        capture=False,  # some estimators cannot be: all are to be timed alike
    )
    stopped = ""
    try:
        train_pair(
            pair,
            elbo,
            sampler(config, data.train, candidate.queries, augment="rotations"),
            config=steps,
            folder=folder,
            data=name,
            validation=validation,
            identity=candidate.identity() | {"width": config.width},
            resume=config.resume,
            label=label or candidate.estimator,
        )
    except FloatingPointError as error:
        stopped = str(error)
    lines = read_metrics(folder / "metrics.jsonl")
    facts = {**candidate._asdict(), "evaluations": cost, "stopped": stopped, "seed": config.seed}
    return pair, Training.of_metrics(lines, **facts)


def train_and_score(
    config: LaboratoryConfig, data: Split, where: str, candidate: Candidate, **budget: Any
) -> tuple[Training, torch.Tensor]:
    """Train and score one candidate, and give the NLL of each test image; kept in a file, and not done twice."""

    def run() -> dict[str, Any]:
        folder = config.out / "train" / where
        pair, training = train(config, data, folder, candidate, name=config.data, **budget)
        if training.stopped:
            return {"training": training.plain(), "nll": []}
        episode = sampler(config, data.test, config.test_images, seed=2, shared_memory=False).sample()
        nll, kl = score(pair, episode, samples=config.test_samples)
        training = training._replace(test_nll=Mean.of(nll), test_kl_address=Mean.of(kl))
        return {"training": training.plain(), "nll": nll.tolist()}

    content = once(config, f"train-{where}", run)
    return Training.of_plain(content["training"]), torch.tensor(content["nll"])


def minus_judge(judge: torch.Tensor, run: tuple[Training, torch.Tensor]) -> Training:
    """Compare a run to VIMCO's, image by image."""
    training, nll = run
    if not len(nll) or not len(judge):
        return training
    return training._replace(test_minus_vimco=Mean.of(nll - judge))


def train_all(config: LaboratoryConfig, data: Split) -> list[Training]:
    """Train all candidates with as many decoder evaluations as VIMCO."""
    assert config.minutes is not None  # resolved
    first, *others = config.plan().trained
    judge, nll = train_and_score(config, data, first.folder, first, minutes=config.minutes)
    budget = judge.updates * judge.evaluations * judge.queries
    runs = [judge]
    for candidate in others:
        episode = sampler(config, data.validation, 4, seed=1).sample()
        cost = evaluations_of(make(*candidate[:2]), *initial_pair(config), (episode.memory, episode.x))
        updates = max(2, round(budget / (cost * candidate.queries)))
        limits: dict[str, Any] = {"minutes": max(0.5, 1.5 * config.minutes), "updates": updates}
        runs.append(minus_judge(nll, train_and_score(config, data, candidate.folder, candidate, **limits)))
    return runs


def train_finalists(config: LaboratoryConfig, data: Split, runs: Sequence[Training]) -> list[Training]:
    """Train the best VIMCO for longer, and the best of the others in half of its time, for each seed.

    Selected on held-out classes of the training alphabets; the test classes are scored, not looked at.
    """
    assert config.final_minutes is not None  # resolved
    ranked = sorted((r for r in runs if r.validation and not r.stopped), key=lambda r: r.validation[-1][2])
    judges = [run.candidate for run in ranked if run.estimator == JUDGE]
    rivals = [run.candidate for run in ranked if run.estimator != JUDGE]
    if not judges or not rivals:
        raise ValueError("training: expected a run of vimco and of another that did not diverge, got none")
    judge, rival = judges[0], rivals[0]
    # Other work on the machine slows one run and not the next: half of the time is a number of updates.
    cost = once(config, f"cost-{rival.folder}", partial(compare_costs, config, data, rival, judge))["ratio"]
    finalists = []
    for minutes in config.final_minutes:
        for seed in range(config.seed, config.seed + config.final_seeds):
            seeded = replace(config, seed=seed)
            facts: dict[str, Any] = {"final_minutes": minutes}
            limits: dict[str, Any] = {"minutes": minutes, "label": f"vimco, {minutes:g} minutes, seed {seed}"}
            run, nll = train_and_score(seeded, data, final_folder(minutes, seed), judge, **limits)
            finalists.append(run._replace(**facts))
            limits = {
                "updates": max(2, round(run.updates / (2 * cost))),
                "label": f"{rival.estimator}, half of it",
            }
            scored = train_and_score(seeded, data, final_folder(minutes, seed) + "-half", rival, **limits)
            finalists.append(minus_judge(nll, scored)._replace(update_cost=cost, **facts))
    return finalists


def final_folder(minutes: float, seed: int) -> str:
    """Name the folder of VIMCO's run in the final."""
    return f"final-{minutes:g}-{seed}"


def compare_costs(
    config: LaboratoryConfig, data: Split, candidate: Candidate, judge: Candidate
) -> dict[str, float]:
    """Time an update against the judge's, both in turns: the median ratio of the rounds."""
    turns = {who.folder: partial(next, make_updates(config, data, who)) for who in (candidate, judge)}
    rounds, warm_up = (3, 1) if config.tiny else (48, 12)
    seconds = take_turns(turns, repetitions=rounds, warm_up=warm_up, label="an update of both")
    return {"ratio": ratio(seconds[candidate.folder], seconds[judge.folder]).median}


def make_updates(config: LaboratoryConfig, data: Split, candidate: Candidate) -> Iterator[None]:
    """Make one update after the other, as in training."""
    loss_fn = make(*candidate[:2])(*initial_pair(config))
    optimizer = torch.optim.Adam(loss_fn.parameters(), candidate.learning_rate, fused=True)
    for episode in sampler(config, data.train, candidate.queries, augment="rotations"):
        optimizer.zero_grad()
        (loss_fn(episode.memory, episode.x) / candidate.queries).backward()
        nn.utils.clip_grad_norm_(loss_fn.parameters(), 100.0)
        optimizer.step()
        yield


def score(
    pair: Pair, episode: Episode, *, samples: int, seed: int = 0
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Measure the NLL of each of the episode's images from `samples` importance samples, and KL(a), in nats."""
    nll = -log_likelihood(*pair, episode.memory, episode.x, num_samples=samples, seed=seed)
    with undisturbed(*pair, seed=seed):
        kl_address = split_bound(*pair, episode.memory, episode.x).kl_address
    return nll, kl_address
