"""Scoring images: the library's chunks against one image and a few samples at a time."""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from figures import BenchmarkConfig, write
from machine import peak_memory
from pyro import poutine

from vma_pyro import ConvNetworks, Guide, Memory, Model, cli
from vma_pyro._system import checkpoint
from vma_pyro._system.markdown import table
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.evaluation import log_likelihood, undisturbed
from vma_pyro.infer import MultiSampleELBO, log_weights
from vma_pyro.training import device_of_name


@dataclass(frozen=True)
class EvaluationConfig(BenchmarkConfig):
    """Score images under a memory of 32 entries."""

    load: Path | None = None
    """A trained model, `model.pt` of `few_shot.py`; None: initial weights, whose figures mean nothing."""
    width: float = 0.33
    """Factor on the paper's 48 and 64 maps, without `load`."""
    images: int = 1000
    """Images scored by the library."""
    samples: int = 1000
    """Importance samples per image."""
    chunks: tuple[int, ...] = (1, 4, 20, 100, 1000)
    """Samples at a time where images are scored one at a time."""
    seconds: float = 10.0
    """Time for each of these ways; the rest is extrapolated."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def programs(config: EvaluationConfig) -> tuple[Model, Guide]:
    """Model and guide."""
    torch.manual_seed(0)
    content: dict[str, Any] = {} if config.load is None else checkpoint.load(config.load)
    architecture = content.get("architecture", {"latent_dim": 64, "width": config.width})
    networks = ConvNetworks(architecture["latent_dim"], width=architecture["width"])
    model, guide = Model(networks), Guide(networks)
    if content:
        checkpoint.restore(MultiSampleELBO()(model, guide), content["weights"], name=str(config.load))
    device = device_of_name(config.accelerator)
    return model.to(device), guide.to(device)


def read_width(config: EvaluationConfig) -> float:
    """Width of the networks that are timed."""
    if config.load is None:
        return config.width
    return float(checkpoint.load(config.load)["architecture"]["width"])


def unseen(config: EvaluationConfig) -> tuple[Memory, torch.Tensor]:
    """A memory of 8 classes x 4 examples, and other examples of these classes."""
    shape: dict[str, Any] = {"classes": 8, "shots": 4, "queries": config.images}
    examples = 4 + -(-config.images // shape["classes"])
    episode = EpisodeSampler(glyphs.load(classes=60, examples=examples, seed=1), **shape, seed=0).sample()
    episode = episode.to(device_of_name(config.accelerator))
    return episode.memory, episode.x


def ours(config: EvaluationConfig) -> float:
    """Seconds per image."""
    model, guide = programs(config)
    memory, x = unseen(config)
    log_likelihood(model, guide, memory, x[:2], num_samples=10)
    start = time.perf_counter()
    log_likelihood(model, guide, memory, x, num_samples=config.samples)
    return (time.perf_counter() - start) / len(x)


def one_by_one(config: EvaluationConfig, chunk: int) -> float:
    """Seconds per image, extrapolated from some chunks: one image and `chunk` samples at a time."""
    model, guide = programs(config)
    memory, x = unseen(config)
    done, start = 0, time.perf_counter()
    with undisturbed(model, guide, seed=0):
        while done < 2 or time.perf_counter() - start < config.seconds:
            log_weights(model, guide, (memory, x[done % len(x)][None]), num_particles=chunk)
            if done == 0:  # the first one warms up
                start = time.perf_counter()
            done += 1
    return (time.perf_counter() - start) / (done - 1) * config.samples / chunk


def difference(config: EvaluationConfig, samples: int = 50) -> float:
    """Largest difference in nats between scoring images at once and one at a time, on the same draws."""
    model, guide = programs(config)
    memory, x = unseen(config)
    x, found = x[:8], []
    with undisturbed(model, guide, seed=0):
        with pyro.plate("particles", samples, dim=-2):
            drawn = poutine.trace(guide).get_trace(memory, x)
            at_once = weights_of(model, guide, memory, x, drawn, slice(None))
        for b in range(len(x)):
            with pyro.plate("particles", samples, dim=-2):
                found.append(weights_of(model, guide, memory, x[b : b + 1], drawn, slice(b, b + 1)))
    bounds = [w.logsumexp(0) for w in (at_once, torch.cat(found, 1))]
    return (bounds[0] - bounds[1]).abs().max().item()


def weights_of(
    model: Model, guide: Guide, memory: Memory, x: torch.Tensor, drawn: poutine.Trace, images: slice
) -> torch.Tensor:
    """log w [K, B] of what was drawn for some images."""
    latents = poutine.Trace()
    for name in ("address", "z"):
        node: Any = drawn.nodes[name]
        latents.add_node(name, **{**node, "value": node["value"][:, images]})
    log_p, log_q = (_log_prob(poutine.replay(program, trace=latents), memory, x) for program in (model, guide))
    return log_p - log_q


def _log_prob(program: Any, memory: Memory, x: torch.Tensor) -> torch.Tensor:
    trace = poutine.trace(program).get_trace(memory, x)
    trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"] for name in ("address", "z", "x") if name in trace.nodes)


def main(config: EvaluationConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, width=0.1, images=6, samples=8, chunks=(1, 4), seconds=0.01)
    nats = difference(config)
    seconds = ours(config)
    slow = {chunk: one_by_one(config, chunk) for chunk in config.chunks}
    memory: dict[int, float] = {}
    if config.accelerator == "cpu" and not config.tiny:
        few = replace(config, images=100)
        memory = {n: peak_memory(ours, replace(few, samples=n)) for n in (10, 100, 1000)}
    content = {
        "images": config.images,
        "samples": config.samples,
        "images_per_second": 1 / seconds,
        "one_image_at_a_time": [
            {"samples_at_a_time": chunk, "images_per_second": 1 / s, "ratio": s / seconds}
            for chunk, s in slow.items()
        ],
        "difference_nats": nats,
        "peak_gib": {str(n): gib for n, gib in memory.items()},
    }
    rows: list[list[object]] = [["all images, in chunks", f"{1 / seconds:.2f}", "1"]]
    rows += [
        [f"one image, {chunk} samples at a time", f"{1 / s:.3f}", f"{s / seconds:.2f}"]
        for chunk, s in slow.items()
    ]
    parts = [
        f"log p(x | M) of {config.images} images from {config.samples} importance samples each, |M| = 32, width "
        f"{read_width(config):g}. One image at a time: `log_weights` in a loop, encoding the memory for each "
        "chunk; some chunks are timed, the rest extrapolated. On the same draws, eight images at once and one at "
        f"a time have the same bounds to {nats:.0e} nats.",
        table(["", "images per second", "times slower"], rows),
    ]
    if memory:
        peaks = "; ".join(f"{n} samples {gib:.2f} GiB" for n, gib in memory.items())
        parts.append(f"Peak resident memory of a process that scores 100 images: {peaks}.")
    device = device_of_name(config.accelerator)
    write(config.output, "evaluation", "Scoring images", content, parts, device=device)


if __name__ == "__main__":
    cli.run(main, EvaluationConfig, __doc__)
