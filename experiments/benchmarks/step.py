"""One parameter update: ours, through Pyro, against the same mathematics by hand.

All take turns, each with networks and an Adam of its own; those with a memory per query (as the public PyTorch
re-implementation has it) on episodes of that kind, all others on the same episodes. Before anything is timed,
bound and gradients of ours are compared with the hand-written version's on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
from page import cli, device_of, machine, table, write
from pyro.infer.elbo import ELBO
from reference import Reencoding, vimco_loss
from timing import Spread, matrix_product_rate, peak_memory, ratio, take_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from update import episodes, updates

from vma_pyro import ConvNetworks, Guide, Model
from vma_pyro.data import Episode
from vma_pyro.infer import EnumeratedELBO, GraphELBO, MultiSampleELBO

OURS, HAND = "ours", "by hand"
OWN, REENCODING = "ours, a memory per query", "re-encoding every read"
K, SIZE = 4, 32  # particles, |M|


@dataclass(frozen=True)
class StepConfig:
    """Time one parameter update."""

    output: Path = Path("runs/benchmarks")
    """Folder for step.json, step.md and step.png."""
    widths: tuple[float, ...] = (0.25, 0.33, 1.0)
    """Factors on the paper's 48 and 64 maps: the CPU defaults for glyphs and Omniglot, and the paper's."""
    batches: tuple[int, ...] = (32, 64)
    """Images per update."""
    repetitions: int = 30
    """Updates of each."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    tiny: bool = False
    """Everything once, as small as it gets, to see that it runs."""


class Contender(NamedTuple):
    """One way to make an update.

    Attributes:
        loss: from an episode to minus the bound, summed over images.
        networks: whose gradients are compared.
        parameters: what Adam moves.
        own_memory: whether every image has a memory of its own.
    """

    loss: Callable[[Episode], Tensor]
    networks: ConvNetworks
    parameters: list[nn.Parameter]
    own_memory: bool = False


def contenders(width: float, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """All of them, to be made; each on networks of its own with the same initial weights."""

    def networks() -> ConvNetworks:
        torch.manual_seed(0)
        return ConvNetworks(width=width).to(device)

    def ours(elbo: ELBO, own_memory: bool = False) -> Contender:
        nets = networks()
        loss_fn = elbo(Model(nets), Guide(nets).to(device))
        return Contender(lambda e: loss_fn(e.memory, e.x), nets, list(loss_fn.parameters()), own_memory)

    def by_hand() -> Contender:
        nets, log_scale = networks(), nn.Parameter(torch.tensor(math.log(10.0), device=device))
        return Contender(
            lambda e: vimco_loss(nets, log_scale, e.memory.entries, e.x, num_particles=K),
            nets,
            [*nets.parameters(), log_scale],
        )

    def reencoding() -> Contender:
        public = Reencoding(networks(), networks()).to(device)
        return Contender(
            lambda e: public(e.memory.entries, e.x, num_particles=K),
            public.networks,
            list(public.parameters()),
            own_memory=True,
        )

    return {
        OURS: lambda: ours(MultiSampleELBO(K, max_plate_nesting=1)),
        HAND: by_hand,
        OWN: lambda: ours(MultiSampleELBO(K, max_plate_nesting=1), own_memory=True),
        REENCODING: reencoding,
        "TraceGraph_ELBO": lambda: ours(GraphELBO(K, vectorize_particles=True, max_plate_nesting=1)),
        "TraceEnum_ELBO": lambda: ours(EnumeratedELBO(1, max_plate_nesting=1)),
    }


def difference(ours: Contender, theirs: Contender, episode: Episode) -> dict[str, float]:
    """Relative differences of bound and gradient on the same samples.

    Raises:
        ValueError: they do not compute the same.
    """
    bounds, gradients = [], []
    for who in (ours, theirs):
        torch.manual_seed(7)
        loss = who.loss(episode)
        loss.backward()
        bounds.append(loss.detach().double())
        gradients.append(
            torch.cat([p.grad.double().flatten() for p in who.networks.parameters() if p.grad is not None])
        )
    found = {
        "bound": ((bounds[0] - bounds[1]) / bounds[1]).abs().item(),
        "gradient": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
    }
    if max(found.values()) > 1e-5:
        raise ValueError(f"reference: expected the same bound and gradient to 1e-5, got {found}")
    return found


def operations(who: Contender, episode: Episode) -> tuple[float, float]:
    """Floating-point operations forward, and of the whole update."""
    with FlopCounterMode(display=False) as forward:
        loss = who.loss(episode)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def some_updates(name: str, width: float, batch: int) -> None:
    """For the memory that they need."""
    device = torch.device("cpu")
    who = contenders(width, device)[name]()
    update = updates(who.loss, who.parameters, episodes(SIZE, batch, device, own_memory=who.own_memory))
    for _ in range(3):
        update()


def measure(config: StepConfig, width: float, batch: int, rate: float) -> dict[str, Any]:
    """One configuration: seconds, ratios, operations, memory."""
    device = device_of(config.accelerator)
    all_ = {name: make() for name, make in contenders(width, device).items()}
    rounds = {own: episodes(SIZE, batch, device, own_memory=own) for own in (False, True)}
    same = difference(all_[OURS], all_[HAND], rounds[False][0])
    counted = {name: operations(who, rounds[who.own_memory][0]) for name, who in all_.items()}
    turns = {name: updates(who.loss, who.parameters, rounds[who.own_memory]) for name, who in all_.items()}
    label = f"width {width:g}, {batch} images"
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
        "ratio": ratio(seconds[OURS], seconds[HAND])._asdict(),
        "speedup_over_reencoding": ratio(seconds[REENCODING], seconds[OURS])._asdict(),
        "speedup_over_reencoding_own_memory": ratio(seconds[REENCODING], seconds[OWN])._asdict(),
        "counted_over_reencoding": counted[REENCODING][1] / counted[OURS][1],
        "counted_over_reencoding_own_memory": counted[REENCODING][1] / counted[OWN][1],
        "contenders": {
            name: {
                "milliseconds": Spread.of([1e3 * s for s in seconds[name]])._asdict(),
                "images_per_second": batch / Spread.of(seconds[name]).median,
                "forward_gflop": counted[name][0] / 1e9,
                "update_gflop": counted[name][1] / 1e9,
                "share_of_matrix_product_rate": counted[name][1] / Spread.of(seconds[name]).median / rate,
                "peak_gib": memory.get(name),
            }
            for name in all_
        },
    }


def page(ratios: list[dict[str, Any]], rate: float) -> list[str]:
    """What the figures say."""
    lines = [
        f"K = {K}, |M| = {SIZE}; medians, quartiles in brackets; all take turns. Matrix products run",
        f"at {rate / 1e9:.0f} GFLOP/s here. Before timing, bound and gradient of ours and of the hand-written",
        f"version were equal to {max(max(r['difference'].values()) for r in ratios):.0e} on the same samples.",
        "",
        "## Ours over the hand-written version",
        "",
        *table(
            ["width", "images", "ratio of times", "ours, ms", "by hand, ms"],
            [
                [r["width"], r["batch"], spread(r["ratio"])]
                + [spread(r["contenders"][name]["milliseconds"]) for name in (OURS, HAND)]
                for r in ratios
            ],
        ),
        "## Against re-encoding every read, with a second encoder for keys",
        "",
        "That has a memory of its own for every query. Ours with one memory for all queries solves a smaller",
        "problem (|M| encodings instead of |M| times the number of images); with a memory per query the same one.",
        "",
        *table(
            ["width", "images", "shared memory: times faster", "counted", "a memory per query", "counted"],
            [
                [r["width"], r["batch"]]
                + [
                    text
                    for kind in ("over_reencoding", "over_reencoding_own_memory")
                    for text in (spread(r[f"speedup_{kind}"]), f"{r[f'counted_{kind}']:.2f}")
                ]
                for r in ratios
            ],
        ),
        "Counted: the ratio of floating-point operations per update. What is measured differs from it because the",
        "two spend them on different shapes: large convolutions over many images reach a higher share of the rate",
        "of matrix products than small ones, and what is not a convolution (the likelihood, reading the memory,",
        "Adam) is counted as nothing and takes as long for both.",
        "",
        "## All",
        "",
    ]
    for r in ratios:
        rows = [
            [
                name,
                spread(c["milliseconds"]),
                f"{c['images_per_second']:.0f}",
                f"{c['forward_gflop'] / 2:.2f}",
                f"{c['update_gflop']:.1f}",
                f"{100 * c['share_of_matrix_product_rate']:.0f} %",
                "" if c["peak_gib"] is None else f"{c['peak_gib']:.2f}",
            ]
            for name, c in r["contenders"].items()
        ]
        head = ["", "ms", "images/s", "forward GMAC", "GFLOP", "of matrix-product rate", "peak GiB"]
        lines += [f"Width {r['width']:g}, {r['batch']} images:", "", *table(head, rows)]
    return [*lines, "![Images per second](step.png)"]


def spread(values: dict[str, float]) -> str:
    """Median, and the quartiles behind it."""
    return str(Spread(**values))  # type: ignore[arg-type]


def picture(path: Path, ratios: list[dict[str, Any]]) -> None:
    """Images per second of each."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(ratios[0]["contenders"])
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(names):
        values = [r["contenders"][name]["images_per_second"] for r in ratios]
        axes.bar([j + 0.13 * i for j in range(len(ratios))], values, 0.12, label=name)
    axes.set_xticks(
        [j + 0.065 * (len(names) - 1) for j in range(len(ratios))],
        [f"width {r['width']:g}\n{r['batch']} images" for r in ratios],
    )
    axes.set(ylabel="training images per second", yscale="log")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: StepConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, widths=(0.1,), batches=(4,), repetitions=2)
    device = device_of(config.accelerator)
    rate = matrix_product_rate(device, size=256 if config.tiny else 2048)
    ratios = [measure(config, width, batch, rate) for width in config.widths for batch in config.batches]
    content = {"machine": machine(device), "matrix_product_gflops": rate / 1e9, "ratios": ratios}
    write(config.output, "step", "One parameter update", content, page(ratios, rate))
    picture(config.output / "step.png", ratios)


if __name__ == "__main__":
    cli(main, StepConfig, __doc__)
