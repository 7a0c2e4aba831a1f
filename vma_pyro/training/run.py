"""The state of a training run, and what is done with it in every update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vma_pyro._system.double import widest_float
from vma_pyro._system.processor import multiplies_matrices_in_bf16
from vma_pyro._system.ranks import Ranks
from vma_pyro.data import Episode
from vma_pyro.data.episodes import Episodes
from vma_pyro.evaluation import log_likelihood, split_bound, undisturbed
from vma_pyro.memory.bank_memory import BankMemory
from vma_pyro.training.captured import Captured
from vma_pyro.training.compiled import Compiled, faster, is_long
from vma_pyro.training.config import TrainConfig, learning_rate, precision_of
from vma_pyro.training.faults import check_params, find_fault
from vma_pyro.training.loss import Loss, bf16
from vma_pyro.training.optimizers import make_optimizer
from vma_pyro.training.processes import mean_over, start_fabric

SOUND = 1e4  # largest weight of a network that has not been torn apart by its steps


class Run:
    """The state of a run: all of it goes into the checkpoint, and nothing else decides how it goes on."""

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        elbo: ELBO,
        episodes: Episodes,
        config: TrainConfig,
        path: Path,
    ) -> None:
        self.config, self.episodes, self.path = config, episodes, path
        self.ranks = Ranks.start()
        self.fabric = start_fabric(config, self.ranks)
        torch.manual_seed(config.seed + self.ranks.rank)  # noise of its own for each process
        self.bare = elbo(model, guide).to(self.fabric.device)
        if not any(p.requires_grad for p in self.bare.parameters()):
            raise ValueError("model, guide: expected a parameter that requires a gradient, found none")
        mixed = precision_of(config) == "bf16-mixed"
        bf16_matrices = mixed and multiplies_matrices_in_bf16(self.fabric.device)
        optimizer = make_optimizer(config.optimizer, self.bare, config.rate, bf16=bf16_matrices)
        self.average = AveragedModel(self.bare, multi_avg_fn=_average(config.ema_decay))
        self.loss_fn, self.optimizer = self.fabric.setup(self.bare, optimizer)
        autocast = partial(bf16, self.fabric.device) if mixed else nullcontext
        self.plain = Loss(self.loss_fn, backward=self.fabric.backward, autocast=autocast)
        self.loss: Loss = self.plain
        if config.capture and self.ranks.size == 1:
            self.loss = Captured(self.bare, autocast=autocast)
        self.is_compiled: bool | None = None  # not decided yet
        self.identity: dict[str, Any] = {}
        self.update = self.stale = self.bound_count = 0
        self.seconds = self.seconds_before = 0.0
        self.best: dict[str, Tensor] | None = None
        self.best_nll = math.nan
        self.finished = False
        self.budget_changes: list[int] = []  # the updates at which a new budget began
        self.cycles: list[dict[str, Any]] = []  # of training behind the weights at the start
        self.nll_before = math.nan  # of these weights
        self.episode: Episode | None = None  # of the update under way, and the noise before it
        self.noise: Tensor | None = None
        device = self.fabric.device
        self.bound_sum = torch.zeros((), dtype=widest_float(device), device=device)

    def diverged(self, what: str, got: object) -> FloatingPointError:
        """Make the error of a run that cannot go on: the fault of a site, or of steps that are too large."""
        largest = max(float(p.detach().abs().max()) for p in self.bare.parameters())
        if largest < SOUND and self.episode is not None:
            trained = [p for p in self.bare.parameters() if p.requires_grad]
            model, guide = self.bare.model, self.bare.guide
            memory, x = self.episode.memory, self.episode.x
            fault = find_fault(model, guide, memory, x, parameters=trained, noise=self.noise)
            if fault is not None:
                return FloatingPointError(f"{fault}, at update {self.update} with weights up to {largest:.2g}")
        return FloatingPointError(
            f"training: expected finite {what}, got {got} at update {self.update}; "
            f"lower the learning rate (now {self.config.rate})"
        )

    def check_params(self, episode: Episode) -> None:
        """Refuse parameters that are nobody's; see `faults.check_params`."""
        memory = copy.copy(episode.memory)  # what is encoded for this look is not left for the update
        check_params(self.bare.model, self.bare.guide, memory, episode.x, parameters=self.bare.parameters())

    def make_update(self, episode: Episode) -> Tensor:
        """Move the parameters, and their average, by one step; return the norm of the gradient before clipping."""
        progress = self.progress()
        for group in self.optimizer.param_groups:
            group["lr"], group["progress"] = learning_rate(self.config, self.update, progress), progress
        loss = self.gradient(episode)
        norm = nn.utils.clip_grad_norm_(self.loss_fn.parameters(), self.config.clip_norm)
        self.check_gradient(loss, norm)
        self.optimizer.step()
        self.average.update_parameters(self.bare)
        self.update += 1
        self.bound_sum -= loss
        self.bound_count += 1
        return norm

    def choose_loss(self, episode: Episode, note: Callable[[str], object]) -> None:
        """Decide how updates are made: once for a run, as rounding differs between the ways."""
        self.loss.note = self.plain.note = note
        if self.config.compile == "off" or self.is_compiled is False:
            return
        undecided = self.is_compiled is None and self.config.compile == "auto"
        compiled = self.compiled_if_it_pays(episode) if undecided else Compiled(self.plain)
        self.is_compiled = compiled is not None
        self.loss = compiled or self.loss

    def compiled_if_it_pays(self, episode: Episode) -> Compiled | None:
        """Updates with translated networks, where they are faster, in a run that is long enough for it."""
        memory, x = episode.memory, episode.x
        # Processes would have to agree; what changes buffers in an update may not make one on trial; and what is
        # encoded of a memory of a bank is of another size in every update, and would be translated anew.
        if self.ranks.size > 1 or any(True for _ in self.bare.buffers()) or isinstance(memory, BankMemory):
            return None
        if not is_long(self.config, self.loss, memory, x):
            return None
        if isinstance(self.loss, Captured):
            self.loss.wait = 0
        compiled = Compiled(self.plain)  # now, and not before: the compiler takes seconds to import
        return compiled if faster(compiled, self.loss, memory, x) else None

    def gradient(self, episode: Episode) -> Tensor:
        """Compute the loss per image; leaves its gradient in the parameters."""
        self.episode = episode
        if self.fabric.device.type == "cpu":
            self.noise = torch.get_rng_state()
        return self.loss.gradient(episode.memory, episode.x)

    def check_gradient(self, loss: Tensor, norm: Tensor) -> None:
        """Refuse a loss or a gradient that is not finite before it reaches the weights.

        On a GPU, where each look at a value would stall the queue, only the first; `save` refuses the weights.
        """
        if norm.device.type == "cpu" or self.update == 0:
            if not bool(norm.isfinite()):
                raise self.diverged("gradients", f"a norm of {norm.item()}")
            if not bool(loss.isfinite()):
                raise self.diverged("bounds", -loss.item())

    def progress(self) -> float:
        """Compute the share of the budget that is used, 0 to 1."""
        by_updates = self.update / self.config.updates if self.config.updates else 0.0
        by_time = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_updates, by_time))

    def agree(self, value: float) -> float:
        """Give all processes the value of the first."""
        if self.ranks.size == 1:
            return value
        return self.ranks.first(torch.tensor(value, dtype=torch.float64)).item()

    def figures(self, episode: Episode, norm: Tensor) -> dict[str, float]:
        """Compute the bound since the last line, and the KL of each site in the last episode, `kl_<site>`."""
        bound = mean_over(self.ranks, self.bound_sum, self.bound_count)
        if not math.isfinite(bound):
            raise self.diverged("bounds", bound)
        self.bound_sum.zero_()
        self.bound_count = 0
        model, guide = self.bare.model, self.bare.guide
        with undisturbed(model, guide, seed=self.update):
            split = split_bound(model, guide, episode.memory, episode.x)
        return {
            "bound": bound,
            **{f"kl_{site}": kl.mean().item() for site, kl in split.kl.items()},
            "gradient_norm": norm.item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def validate(self, validation: Sequence[Episode]) -> float:
        """Compute the NLL of held-out classes with the averaged weights; keeps these if they are to be kept."""
        average: Any = self.average.module
        total, count = torch.zeros((), dtype=torch.float64), 0
        for episode in validation[self.ranks.rank :: self.ranks.size]:
            self.episode = e = episode.to(self.fabric.device)
            nll = -log_likelihood(
                average.model, average.guide, e.memory, e.x, num_samples=self.config.validation_samples
            )
            total, count = total + nll.sum().cpu(), count + len(nll)
            if math.isnan(float(total)):
                break
        mean = mean_over(self.ranks, total, count)
        if math.isnan(mean):
            raise self.diverged("validation likelihoods", mean)
        if self.best is None or mean < self.best_nll or self.config.keep == "last":
            self.remember()
            self.best_nll, self.stale = mean, 0
        else:
            self.stale += 1
        return mean

    def remember(self) -> None:
        """Remember the averaged weights."""
        self.best = {name: value.detach().clone() for name, value in self.average.module.state_dict().items()}

    def load_best(self) -> None:
        """Put the remembered weights into model and guide, on the CPU or wherever they are."""
        self.bare.load_state_dict(self.best if self.best is not None else self.average.module.state_dict())

    def check_together(self) -> None:
        """Refuse processes that would go on from different updates.

        Raises:
            ValueError: some have found a checkpoint and others none.
        """
        updates = [int(update) for update in self.ranks.gather(torch.tensor([self.update]))]
        if len(set(updates)) > 1:
            raise ValueError(
                f"folder: expected one that all processes share, got checkpoints of updates {updates} by process"
            )


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Average weights with a warm-up: early on they forget the initial ones faster."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
