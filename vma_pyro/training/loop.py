"""The training loop, `fit`: a run from its start or its checkpoint to its end."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from pyro.infer.elbo import ELBO
from torch import nn

from vma_pyro._system.allocator import keep_freed_memory
from vma_pyro._system.lock import holding
from vma_pyro._system.metrics import Recorder
from vma_pyro._system.ranks import Ranks
from vma_pyro.data import Episode
from vma_pyro.data.episodes import Episodes
from vma_pyro.training.config import TrainConfig, identity_of
from vma_pyro.training.processes import take_share
from vma_pyro.training.run import Run
from vma_pyro.training.saved import restore, save, try_to_save
from vma_pyro.training.start import start_from
from vma_pyro.training.stopping import Stop, stop_signals


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
        updates: made in all sessions.
        seconds: of training in all sessions.
        validation_nll: of the weights that were kept, in nats per image; NaN without validation.
        interrupted: the signal that stopped it, or 0; a run out of `session_minutes` counts as SIGTERM.
        budget_changes: the updates at which a resumed run was given another budget.
        cycles: of training behind the weights that the run started from, oldest first; facts of each.
        validation_nll_before: of the weights that the run started from, if these were trained.
        stopped_early: whether validation did not improve `patience` times before the budget was used up.
        compiled: whether updates were made with networks that `torch.compile` has translated.
    """

    updates: int
    seconds: float
    validation_nll: float
    interrupted: int
    budget_changes: Sequence[int] = ()
    cycles: Sequence[dict[str, Any]] = ()
    validation_nll_before: float = math.nan
    stopped_early: bool = False
    compiled: bool = False


def fit(
    model: nn.Module,
    guide: nn.Module,
    elbo: ELBO,
    episodes: Episodes,
    *,
    config: TrainConfig,
    folder: str | Path,
    validation: Sequence[Episode] = (),
    identity: dict[str, Any] | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    label: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train model and guide; on return they hold the averaged weights of the best validation.

    Writes `metrics.jsonl` and `checkpoint.pt` to the folder. Ctrl-C and SIGTERM end the run after the update
    under way, with a checkpoint.

    Args:
        model, guide: modules of (memory, x) that may share parameters.
        elbo: any ELBO with a `differentiable_loss`.
        episodes: where training data comes from.
        config: how to train.
        folder: of the run; is made, and held until the end: no other process can train in it meanwhile.
        validation: episodes of held-out classes for early stopping; none: the last weights are kept.
        identity: further plain values that a resumed run must share (data, objective, ...).
        init: start from the weights of this trained model (or checkpoint, or the word "pretrained") instead of
            fresh ones, with a new optimizer and a learning rate from its start; unless `keep` is last, the result
            is never worse on validation than these.
        resume: go on from the folder's checkpoint if there is one.
        tensorboard: also write TensorBoard events.
        label: in front of the progress line.
        show_progress: whether to draw the progress line.

    Raises:
        ValueError: no budget, a folder that holds another run, a resumed run of another configuration or
            programs, or a damaged checkpoint.
        BlockingIOError: another process trains in the folder.
        OSError: the folder cannot be written; the final checkpoint cannot.
        FloatingPointError: the bound or a parameter is no longer a finite number.
    """
    if config.updates is None and config.minutes is None:
        raise ValueError("updates: expected a budget in updates or minutes, got neither")
    ranks, folder = Ranks.start(), Path(folder)
    with holding(folder, argument="folder") if ranks.rank == 0 else nullcontext():
        folder.mkdir(parents=True, exist_ok=True)
        identity = identity_of(config) | (identity or {}) | ({} if init is None else {"init": str(init)})
        path = folder / "checkpoint.pt"
        run = _begin(model, guide, elbo, episodes, config, path, identity=identity, init=init, resume=resume)
        recorder = Recorder(
            folder if ranks.rank == 0 else None,
            resume_at=run.update,
            tensorboard=tensorboard,
            total=config.updates,
            label=label,
            show=show_progress and ranks.rank == 0,
        )
        with closing(recorder):
            stopped = _until_done(run, validation, recorder)
    run.load_best()
    return _result(run, stopped)


def _begin(
    model: nn.Module,
    guide: nn.Module,
    elbo: ELBO,
    episodes: Episodes,
    config: TrainConfig,
    path: Path,
    *,
    identity: dict[str, Any],
    init: str | Path | None,
    resume: bool,
) -> Run:
    """Begin a run where its checkpoint left it, or at its start, then from the weights in `init`."""
    if path.exists() and not resume:
        raise ValueError(f"folder: expected one without a run, found {path}; resume it or choose another folder")
    keep_freed_memory()
    cycles = start_from(init, (model, guide)) if init is not None and not path.exists() else []
    run = Run(model, guide, elbo, episodes, config, path)
    run.cycles, run.identity = cycles, identity
    if path.exists():
        restore(run)
    run.check_together()
    return run


def _result(run: Run, stopped: int) -> FitResult:
    """Tell how a run has ended."""
    early = run.stale >= run.config.patience and run.progress() < 1
    return FitResult(
        updates=run.update,
        seconds=run.seconds,
        validation_nll=run.best_nll,
        interrupted=stopped,
        budget_changes=run.budget_changes,
        cycles=run.cycles,
        validation_nll_before=run.nll_before,
        stopped_early=early,
        compiled=bool(run.is_compiled),
    )


def _until_done(run: Run, validation: Sequence[Episode], recorder: Recorder) -> int:
    """Train and save; give the signal that ended it, or 0."""
    with stop_signals() as stop:
        try:
            _train(run, validation, recorder, stop)
        except (RuntimeError, ValueError) as error:
            # Sampling from NaN fails in many ways, none of which says what went wrong; NaN in the data does.
            # On a GPU all one learns is that an assertion failed.
            told = re.search(r"\bnan\b|device-side", str(error).lower())
            if str(error).startswith(("x:", "memory", "site ")) or not told:
                raise
            raise run.diverged("parameters", "NaN") from error
    run.finished = not stop.signal
    if run.finished and run.best is None:
        run.remember()
    save(run)
    run.ranks.wait()  # none may leave, and end the job, before the first has written
    return stop.signal


def _train(run: Run, validation: Sequence[Episode], recorder: Recorder, stop: Stop) -> None:
    """Make updates, with all that is due between them, until the run ends."""
    config, fabric = run.config, run.fabric
    session_start = tick = time.monotonic()
    last_save = run.seconds
    stopped = int(run.agree(stop.signal))
    if run.cycles and validation and run.update == 0:
        run.nll_before = run.validate(validation)
        recorder.write(0, validation_nll=run.nll_before, best_validation_nll=run.best_nll, seconds=run.seconds)
    checked = False
    while not (run.finished or stopped or run.progress() >= 1 or run.stale >= config.patience):
        episode = take_share(run.episodes.sample(), run.ranks).to(fabric.device)
        if not checked:
            run.check_params(episode)
            run.choose_loss(episode, recorder.note)
            checked = True
        norm = run.make_update(episode)
        recorder.advance()
        if run.update % config.log_every == 0:
            now = time.monotonic()
            speed = config.log_every / max(now - tick, 1e-9)
            recorder.write(run.update, **run.figures(episode, norm), seconds=run.seconds, updates_per_second=speed)
            tick = now
        # Clocks and signals differ; all processes go by those of the first.
        run.seconds = run.agree(run.seconds_before + time.monotonic() - session_start)
        # Also at the end: the last updates, at the smallest learning rate, are often the best.
        if validation and (run.update % config.validate_every == 0 or run.progress() >= 1):
            nll = run.validate(validation)
            recorder.write(run.update, validation_nll=nll, best_validation_nll=run.best_nll, seconds=run.seconds)
        if run.seconds - last_save > config.checkpoint_seconds:
            try_to_save(run, recorder)
            last_save = run.seconds
        session = run.seconds - run.seconds_before
        if config.session_minutes is not None and session > 60 * config.session_minutes:
            stop.signal = stop.signal or signal.SIGTERM
        stopped = int(run.agree(stop.signal))
    stop.signal = stopped
