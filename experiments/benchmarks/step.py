"""One parameter update: ours, through Pyro, against the same mathematics by hand.

Ours is measured as `fit` makes it: in the precision that suits the processor, recorded once and replayed, or
with networks that `torch.compile` has translated; and with Pyro's Python in every update. The hand-written version
runs in float32, and in the same precision with and without translation. All take turns, each with networks and an
Adam of its own; those with a memory per query (as the public PyTorch re-implementation has it) on episodes of that
kind, all others on the same episodes. Before anything is timed, bound and gradients of ours are compared with the
hand-written version's on the same samples, in float32.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from contenders import (
    COMPILED,
    EVERY,
    HAND,
    OURS,
    OURS32,
    OWN,
    PUBLIC,
    REENCODING,
    SAME,
    SAME_COMPILED,
    SIZE,
    Contender,
    K,
    contenders,
)
from figures import BenchmarkConfig, write
from machine import peak_memory, rates
from step_page import page
from torch.utils.flop_counter import FlopCounterMode
from update import episodes

from common.timing import Spread, milliseconds, ratio, take_turns
from vma_pyro import cli
from vma_pyro._system.processor import is_faster_in_bf16
from vma_pyro.data import Episode
from vma_pyro.training import device_of_name


@dataclass(frozen=True)
class StepConfig(BenchmarkConfig):
    """Time one parameter update."""

    widths: tuple[float, ...] = (0.33, 0.66, 1.0)
    """Factors on the paper's 48 and 64 maps: the default for Omniglot, the published model's, and the paper's."""
    batches: tuple[int, ...] = (64,)
    """Images per update."""
    repetitions: int = 30
    """Updates of each."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def difference(ours: Contender, theirs: Contender, episode: Episode) -> dict[str, float]:
    """Relative differences of bound and gradient on the same samples.

    Raises:
        ValueError: they do not compute the same.
    """
    bounds, gradients = [], []
    for who in (ours, theirs):
        torch.manual_seed(7)
        loss = who.loss_fn(episode.memory, episode.x)
        loss.backward()
        bounds.append(loss.detach().double())
        gradients.append(
            torch.cat([p.grad.double().flatten() for p in who.networks.parameters() if p.grad is not None])
        )
    found = {
        "bound": ((bounds[0] - bounds[1]) / bounds[1]).abs().item(),
        "gradient": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
    }
    if max(found.values()) > 5e-5:  # of sums in float32
        raise ValueError(f"reference: expected the same bound and gradient to 5e-5, got {found}")
    return found


def operations(who: Contender, episode: Episode) -> tuple[float, float]:
    """Floating-point operations forward, and of the whole update."""
    who.loss_fn(episode.memory, episode.x)  # at the first one an objective has a look at its programs
    with FlopCounterMode(display=False) as forward:
        loss = who.loss_fn(episode.memory, episode.x)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def some_updates(name: str, width: float, batch: int) -> None:
    """Make a few updates, to see how much memory they need."""
    device = torch.device("cpu")
    who = contenders(width, device)[name]()
    update = who.updates(episodes(SIZE, batch, device, own_memory=who.own_memory))
    for _ in range(3):
        update()


def measure(config: StepConfig, width: float, batch: int) -> dict[str, Any]:
    """Measure one configuration: seconds, ratios, operations, memory."""
    device = device_of_name(config.accelerator)
    backend = "eager" if config.tiny else None  # to translate networks takes a minute
    all_ = {name: make() for name, make in contenders(width, device, backend=backend).items()}
    rounds = {own: episodes(SIZE, batch, device, own_memory=own) for own in (False, True)}
    same = difference(all_[OURS32], all_[HAND], rounds[False][0])
    counted = {name: operations(who, rounds[who.own_memory][0]) for name, who in all_.items()}
    turns = {name: who.updates(rounds[who.own_memory]) for name, who in all_.items()}
    label = f"width {width:g}, {batch} images"
    # Those of the first table, most of which are close: more rounds, on their own.
    close = {name: turns[name] for name in (OURS, COMPILED, EVERY, HAND, SAME, SAME_COMPILED, OURS32)}
    pairs = take_turns(close, repetitions=3 * config.repetitions, device=device, label=label)
    seconds = take_turns(turns, repetitions=config.repetitions, device=device, label=label)
    memory = {}
    if config.accelerator == "cpu" and not config.tiny:
        memory = {name: peak_memory(some_updates, name, width, batch) for name in all_}
    return {
        "width": width,
        "batch": batch,
        "num_particles": K,
        "memory": SIZE,
        "difference": same,
        "ratios": {
            f"{ours} / {hand}": ratio(pairs[ours], pairs[hand])._asdict()
            for ours, hand in (
                (OURS, HAND),
                (COMPILED, HAND),
                (OURS, SAME),
                (EVERY, SAME),
                (COMPILED, SAME_COMPILED),
                (OURS32, HAND),
            )
        },
        "speedup": {
            mine: {theirs: ratio(seconds[theirs], seconds[mine])._asdict() for theirs in (REENCODING, PUBLIC)}
            | {"counted": counted[REENCODING][1] / counted[mine][1]}
            for mine in (OURS32, OWN)
        },
        "contenders": {
            name: {
                "milliseconds": milliseconds(seconds[name]),
                "images_per_second": batch / Spread.of(seconds[name]).median,
                "forward_gflop": counted[name][0] / 1e9,
                "update_gflop": counted[name][1] / 1e9,
                "gflop_per_second": counted[name][1] / Spread.of(seconds[name]).median / 1e9,
                "peak_gib": memory.get(name),
            }
            for name in all_
        },
    }


def main(config: StepConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, widths=(0.1,), batches=(4,), repetitions=2)
    device = device_of_name(config.accelerator)
    fastest = {name: rate / 1e9 for name, rate in rates(device, size=256 if config.tiny else 2048).items()}
    rows = [measure(config, width, batch) for width in config.widths for batch in config.batches]
    content = {
        "gflop_per_second": fastest,
        "configurations": rows,
    }
    write(
        config.output,
        "step",
        "One parameter update",
        content,
        page(rows, fastest, mixed=is_faster_in_bf16(device)),
        device=device,
    )


if __name__ == "__main__":
    cli.run(main, StepConfig, __doc__)
