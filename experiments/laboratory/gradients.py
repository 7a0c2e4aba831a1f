"""The quality of gradients: all estimators at three stages of training, some for growing K and |M|."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.kept import once
from laboratory.findings import Quality
from laboratory.options import SWEPT, Candidate, LaboratoryConfig, initial_pair, sampler
from laboratory.runs import final_folder, train
from laboratory.toy import toy
from vma_pyro.data import Split, load_split
from vma_pyro.infer import compare, make, matched
from vma_pyro.models import Pair


def measure(
    config: LaboratoryConfig,
    pair: Pair,
    args: tuple[Any, ...],
    *,
    program: str,
    stage: str,
    memory: int,
    names: Sequence[str],
    evaluations: int,
    draws: int,
) -> Quality:
    """Compare estimators on the same data at a matched number of runs of the model.

    Args:
        config: the seed, and where the table is kept.
        pair, args: model and guide, and their data.
        program, stage, memory: for the record.
        names: of estimators; those that need more runs keep their least.
        evaluations: runs of the model per image and gradient.
        draws: gradients of each.
    """

    def run() -> dict[str, Any]:
        estimators = matched([*names], lambda name, k: make(name, k), evaluations, *pair, args)
        options: dict[str, Any] = {
            "draws": draws,
            "reference_draws": 2 if config.tiny else None,
            "seed": config.seed,
        }
        table = compare(*pair, args, estimators=estimators, show_progress=True, **options)
        return Quality(program, stage, memory, evaluations, table).plain()

    where = f"{program}-{stage}-{memory}" if stage else program
    key = f"{where}-{evaluations}-{len(names)}"
    return Quality.of_plain(once(config, key, run))


def measure_toy(config: LaboratoryConfig, evaluations: int, names: Sequence[str]) -> Quality:
    """Measure gradients on the mixture, whose addresses are summed for reference; twice the cheap draws."""
    size = 8
    model, guide, x = toy(size, config.images, config.seed)
    facts: dict[str, Any] = {"program": "toy", "stage": "", "memory": size, "draws": 2 * config.draws}
    return measure(config, (model, guide), (x,), names=names, evaluations=evaluations, **facts)


def measure_model(
    config: LaboratoryConfig,
    data: Split,
    pair: Pair,
    *,
    program: str,
    stage: str,
    names: Sequence[str],
    evaluations: int = 4,
    shape: tuple[int, int] | None = None,
) -> Quality:
    """Measure gradients of one model on held-out classes; `shape` is classes and shots of the memory."""
    plan = config.plan()
    classes, shots = shape or (plan.classes, plan.shots)
    episode = sampler(config, data.validation, config.images, classes=classes, shots=shots, seed=3).sample()
    facts: dict[str, Any] = {"program": program, "stage": stage, "memory": classes * shots, "draws": config.draws}
    return measure(config, pair, (episode.memory, episode.x), names=names, evaluations=evaluations, **facts)


def train_stages(config: LaboratoryConfig, name: str, data: Split, finalist: Candidate) -> dict[str, Pair]:
    """Load VIMCO's model before training, after `minutes`, and at the end of its long run."""
    assert config.minutes is not None
    assert config.final_minutes is not None
    judge, longest = config.plan().trained[0], config.final_minutes[-1]
    own = {"middle": judge.folder, "end": final_folder(longest, config.seed)}
    again = replace(config, resume=True)  # the data's own two runs are finished, and only loaded
    found = {"start": initial_pair(config)}
    for stage, who, minutes in (("middle", judge, config.minutes), ("end", finalist, longest)):
        where = config.out / "train" / own[stage]
        if name != config.data:  # a comparison on the side: a quarter of the time is enough
            where, minutes = config.out / "stages" / f"{name}-{stage}", minutes / 4
        found[stage], _ = train(again, data, where, who, name=name, minutes=minutes, label=f"{name}, {stage}")
    return found


def measure_all(
    config: LaboratoryConfig, data: Split, finalist: Candidate
) -> tuple[list[Quality], list[Quality], list[Quality]]:
    """Measure all estimators at the stages of training; some for growing K, and for growing memories."""
    plan = config.plan()
    swept = [name for name in SWEPT if name in plan.measured]
    stages = [measure_toy(config, 4, plan.measured)]
    particles = [measure_toy(config, k, swept) for k in plan.particles]
    memories: list[Quality] = []
    for name in dict.fromkeys(("glyphs", config.data)):
        own = data if name == config.data else load_split(name, config.data_dir)
        for stage, pair in train_stages(config, name, own, finalist).items():
            stages.append(measure_model(config, own, pair, program=name, stage=stage, names=plan.measured))
            if name != config.data:
                continue
            what: dict[str, Any] = {"program": name, "stage": stage, "names": swept}
            particles += [measure_model(config, own, pair, evaluations=k, **what) for k in plan.particles]
            memories += [measure_model(config, own, pair, shape=(m // 4, 4), **what) for m in plan.memories]
    return stages, particles, memories
