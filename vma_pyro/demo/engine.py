"""What the page asks of model and guide: look up, generate, interpolate. Any program of (memory, x) serves."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from vma_pyro.demo.format import as_bytes, format_of
from vma_pyro.demo.messages import Found, Generate, Images, Interpolate, Look
from vma_pyro.evaluation import distribution_at, split_bound
from vma_pyro.memory import Memory

ROUNDING = 1e-4  # nats


class Engine:
    """Serves one request at a time: torch's noise is shared by all threads, and so are the cores.

    Nothing of a request outlives it.

    Args:
        model, guide: programs with sites `address`, `z` and `x`.

    Attributes:
        format: of the images that the model takes.
    """

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        self.model, self.guide = model.eval(), guide.eval()
        self.format = format_of(model)
        self._lock = threading.Lock()

    def look(self, request: Look) -> Found:
        """Find q(a | x, M), and KL(a) in nats and bits."""
        memory, x = Memory(self.format.read(request.entries)), self.format.read([request.image])
        with self._alone(seed=0):
            split = split_bound(self.model, self.guide, memory, x)
        most = math.log(memory.size)
        nats = max(split.kl_address.item(), 0.0)
        if nats - most < ROUNDING:  # what single precision adds; under a p(a) that is not uniform it may be more
            nats = min(nats, most)
        return Found(
            probabilities=split.address_probs[0].tolist(),
            kl_nats=nats,
            kl_bits=nats / math.log(2),
            most_nats=most,
            most_bits=most / math.log(2),
        )

    def generate(self, request: Generate) -> Images:
        """Draw addresses, z and x from the model, and show E[x | z, m_a] beside x."""
        memory = Memory(self.format.read(request.entries))
        with self._alone(request.seed):
            trace = poutine.trace(self.model).get_trace(memory, num_images=request.count)
            means = mean_of(trace)
        address: Any = trace.nodes["address"]["value"]
        x: Any = trace.nodes["x"]["value"]
        drawn = as_bytes(x)
        return Images(images=means or drawn, drawn=drawn, addresses=address.flatten().tolist())

    def interpolate(self, request: Interpolate) -> Images:
        """Show E[x | z, m] between two draws of z, along an arc about its mean.

        Of a Gaussian each point of it is a draw as well. What has no mean is walked in a straight line.
        """
        memory = Memory(self.format.read([request.entry]))
        with self._alone(request.seed):
            prior = distribution_at(poutine.trace(self.model).get_trace(memory, num_images=1), "z")
            z = walk(prior, request.steps)
            model = poutine.condition(self.model, data={"z": z})
            trace = poutine.trace(model).get_trace(memory, num_images=request.steps)
            means = mean_of(trace)
        x: Any = trace.nodes["x"]["value"]
        drawn = as_bytes(x)
        return Images(images=means or drawn, drawn=drawn, addresses=[0] * request.steps)

    @contextmanager
    def _alone(self, seed: int) -> Iterator[None]:
        """Let one thread in, without gradients, with noise of its own."""
        with self._lock, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield


def walk(prior: Any, steps: int) -> Float[Tensor, "steps Z"]:
    """Walk from one draw of a distribution of one datapoint to another."""
    first, last = prior.sample((2,)).flatten(1, -2)[:, 0]
    try:
        mean = prior.mean.flatten(0, -2)[0]
    except (NotImplementedError, AttributeError):  # as of a flow
        share = torch.linspace(0, 1, steps).unsqueeze(-1)
        return first + share * (last - first)
    angle = torch.linspace(0, math.pi / 2, steps).unsqueeze(-1)
    return mean + angle.cos() * (first - mean) + angle.sin() * (last - mean)


def mean_of(trace: poutine.Trace) -> list[str]:
    """Write the means of site `x` as bytes; nothing where the likelihood has none."""
    try:
        mean: Tensor = distribution_at(trace, "x").mean
    except NotImplementedError:
        return []
    return as_bytes(mean)
