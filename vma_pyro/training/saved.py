"""The checkpoint of a run: all of its state, and how a later session goes on from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vma_pyro._system import checkpoint
from vma_pyro._system.metrics import Recorder
from vma_pyro.models import describe
from vma_pyro.models.description import check_arguments
from vma_pyro.models.provenance import check_weights, record_provenance, with_weights
from vma_pyro.models.sources import check_sources, digest_sources
from vma_pyro.training.config import BUDGET, TrainConfig, check_identity, differences
from vma_pyro.training.layout import lay_state
from vma_pyro.training.run import Run


def save(run: Run) -> None:
    """Write the checkpoint; never over a good one with weights that are lost."""
    if not all(bool(p.isfinite().all()) for p in run.bare.parameters()):
        raise run.diverged("weights", "NaN or infinity")
    gather = run.ranks.gather
    noise = torch.stack(gather(torch.get_rng_state()))  # of all processes
    bounds = torch.stack(gather(run.bound_sum.cpu().double()))
    cuda = None
    if run.fabric.device.type == "cuda":
        cuda = torch.stack(gather(torch.cuda.get_rng_state(run.fabric.device)))
    if run.ranks.rank > 0:
        return
    weights = run.best if run.best is not None else run.average.module.state_dict()
    programs = with_weights(run.bare, weights)
    content = {
        **describe(run.bare.model, run.bare.guide),
        "weights": weights,
        "program": record_provenance(programs.model, programs.guide),
        "identity": run.identity,
        "cycles": run.cycles,
        "module": run.bare.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "trained": _trained(run),
        "episodes": run.episodes.state_dict(),
        "rng": {"cpu": noise, "cuda": cuda},
        "progress": {
            "update": run.update,
            "seconds": run.seconds,
            "finished": run.finished,
            "is_compiled": run.is_compiled,
            "has_best": run.best is not None,
            "best_nll": run.best_nll,
            "nll_before": run.nll_before,
            "stale": run.stale,
            "budget_changes": run.budget_changes,
            "bound_sum": bounds,
            "bound_count": run.bound_count,
        },
    }
    checkpoint.save(run.path, content)


def try_to_save(run: Run, recorder: Recorder) -> None:
    """Write the checkpoint, but let a full disk end neither the run nor the previous checkpoint."""
    try:
        save(run)
    except OSError as error:
        recorder.note(f"warning: checkpoint not written ({error}); the previous one is kept")


def restore(run: Run) -> None:
    """Go on from the checkpoint.

    Raises:
        ValueError: written under another configuration or by other programs, or damaged.
    """
    content = checkpoint.load(run.path)
    if "progress" not in content:
        raise ValueError(f"checkpoint {run.path}: expected one of a training run, got weights only")
    check_identity(content["identity"], run.identity, new_budget=run.config.new_budget)
    _check_more(run.config, content["progress"])
    _restore_weights(run, content)
    run.average.load_state_dict(content["average"])
    _restore_optimizer(run, content)
    run.episodes.load_state_dict(content["episodes"])
    _restore_noise(run, content["rng"], content["progress"]["update"])
    _restore_progress(run, content["progress"])
    # Without a validation the last weights count, and those of an earlier end are not better than what follows.
    judged = content["progress"]["has_best"] and not math.isnan(run.best_nll)
    run.best = content["weights"] if judged else None
    run.cycles = content.get("cycles", [])
    if set(differences(content["identity"], run.identity)) & set(BUDGET):
        run.budget_changes = [*run.budget_changes, run.update]
        run.finished, run.stale = False, 0


def _check_more(config: TrainConfig, progress: dict[str, Any]) -> None:
    """Refuse a new budget that is used up already: budgets are those of all sessions together."""
    used = {"updates": progress["update"], "minutes": progress["seconds"] / 60}
    for name, had in used.items():
        budget = getattr(config, name)
        if config.new_budget and budget is not None and budget < math.floor(had * 10) / 10:
            raise ValueError(
                f"{name}: expected more than the {had:.4g} that this run has had, as a new budget is one of all "
                f"its sessions together, got {budget:g}"
            )


def _restore_weights(run: Run, content: dict[str, Any]) -> None:
    """Take the weights back, if these are still the programs that they belong to."""
    program = content.get("program")  # checkpoints of before have none, nor parts
    if program is not None:
        check_sources(program["sources"], digest_sources(run.bare.model, run.bare.guide))
    check_arguments(content, describe(run.bare.model, run.bare.guide))
    checkpoint.restore(run.bare, content["module"], name="this run")
    programs = with_weights(run.bare, content["weights"])
    check_weights(program, programs.model, programs.guide, file=str(run.path))


def _restore_optimizer(run: Run, content: dict[str, Any]) -> None:
    """Take up the optimizer's state, which belongs to parameters by their order among those that are trained."""
    now, then = _trained(run), content.get("trained")  # checkpoints of before do not say
    if then is not None and now != then:
        for name, _ in run.bare.named_parameters():
            if (name in now) != (name in then):
                was, found = ("trained" if name in names else "frozen" for names in (then, now))
                raise ValueError(f"{name}: expected to be {was} as in {run.path}, got it {found}")
        at = next(n for n, (name, other) in enumerate(zip(now, then, strict=True)) if name != other)
        raise ValueError(f"parameters: expected {then[at]} at place {at} as in {run.path}, got {now[at]}")
    run.optimizer.load_state_dict(content["optimizer"])
    lay_state(run.optimizer.optimizer)


def _trained(run: Run) -> list[str]:
    """Names of the parameters that the optimizer has, in its order: of those not frozen when the run began."""
    names = {p: name for name, p in run.bare.named_parameters()}
    return [names[p] for group in run.optimizer.param_groups for p in group["params"]]


def _restore_progress(run: Run, progress: dict[str, Any]) -> None:
    """Take up the counts and the clock where they were."""
    run.update, run.stale = progress["update"], progress["stale"]
    run.seconds = run.seconds_before = progress["seconds"]
    run.best_nll, run.finished = progress["best_nll"], progress["finished"]
    run.is_compiled = progress.get("is_compiled", False)  # checkpoints of before were not
    run.nll_before = progress.get("nll_before", math.nan)  # checkpoints of before have none
    run.budget_changes = progress.get("budget_changes", [])
    bound = _own(torch.atleast_1d(torch.as_tensor(progress["bound_sum"])), run.ranks.rank)
    run.bound_sum.fill_(0.0 if bound is None else bound)
    run.bound_count = progress["bound_count"]


def _restore_noise(run: Run, saved: dict[str, Any], update: int) -> None:
    """Go on with the process's own random stream; one that the saved run did not have begins a new one."""
    torch.manual_seed(hash((run.config.seed, run.ranks.rank, update)) % 2**63)
    own = _own(torch.atleast_2d(saved["cpu"]), run.ranks.rank)
    if own is not None:
        torch.set_rng_state(own)
    own = None if saved["cuda"] is None else _own(torch.atleast_2d(saved["cuda"]), run.ranks.rank)
    if own is not None and run.fabric.device.type == "cuda":
        torch.cuda.set_rng_state(own, run.fabric.device)


def _own(saved: Tensor, rank: int) -> Tensor | None:
    """Take this process's row of what all have saved; None if there were fewer of them."""
    # A copy: the setters of random states read a view from the start of what it views.
    return saved[rank].clone() if rank < len(saved) else None
