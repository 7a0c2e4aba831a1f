r"""Attend, infer, repeat, in small: how many objects a canvas shows, where, and what they look like.

.. math::
    s_t \sim \mathrm{Bernoulli}(\rho \, s_{t-1}), \quad s_0 = 1, \qquad
    u_t \sim \mathcal N(c_t, \sigma_u^2), \qquad v_t \sim \mathcal N(0, I), \qquad
    x \sim \mathcal N \Big( \sum_t s_t \, T_{u_t} \big( g_0 + \textstyle\sum_j v_{tj} g_j \big), \sigma_x^2 \Big)

(Eslami et al. 2016: s is their z_pres, u their z_where, v their z_what; T draws a patch on the canvas by an
affine grid.) The number of objects is geometric, cut at two. Departures: all objects have one size; the decoder
is linear in v and known, so that the guide alone learns; the first object tends to be left of the second (c_t),
without which the posterior has a mode for each order and the guide one of them, at a price of log 2; an object
that is not there is drawn from its prior in both programs, which leaves the weight as a mask would, and lets
relaxations read s softly. To learn the model as well, `model.requires_grad_()`.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from .air_evidence import DRAWS, evidence
from .canvas import CENTRES, FACTORS, NOISE, PATCH, PRESENT, SIDE, SPREAD, STEPS, centres_of_pixels, draw, glimpse
from .interface import Field

CANVASES = 48


class Scene(nn.Module):
    """p(s) p(u) p(v) p(x | s, u, v)."""

    def __init__(self) -> None:
        super().__init__()
        x, y = centres_of_pixels(PATCH).unbind(-1)
        blob = (-2 * (x**2 + y**2)).exp()
        # A round blob, which v stretches along the axes and along the diagonals.
        self.parts = nn.Parameter(torch.stack([1.4 * blob, 3 * blob * (x**2 - y**2), 6 * blob * x * y]))
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "B S S"]) -> Any:
        """Canvases."""
        with pyro.plate("data", len(x)):
            canvas, present = torch.zeros_like(x), torch.ones(len(x))
            for t in range(STEPS):
                present = pyro.sample(f"present_{t + 1}", dist.Bernoulli(PRESENT * present))
                where = pyro.sample(f"where_{t + 1}", dist.Normal(CENTRES[t], SPREAD).to_event(1))
                what = pyro.sample(f"what_{t + 1}", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
                patch = self.parts[0] + torch.einsum("...j,jgh->...gh", what, self.parts[1:])
                canvas = canvas + present[..., None, None] * draw(patch[..., None, :, :], where).squeeze(-3)
            return pyro.sample("x", dist.Normal(canvas, NOISE).to_event(2), obs=x)


class Inference(nn.Module):
    """q(s | x) q(u | s, x) q(v | s, x seen at u).

    An object is looked for by a filter, one for each step, which starts as a blur: q(u) has its mean at the centre
    of the filter's exponentiated response times the prior.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.filters = nn.Conv2d(1, STEPS, PATCH + 1, padding=PATCH // 2)
            self.canvas = nn.Sequential(nn.Linear(SIDE**2 + STEPS, 64), nn.ReLU(), nn.Linear(64, 3 * STEPS))
            self.patch = nn.Sequential(nn.Linear(PATCH**2, 64), nn.ReLU(), nn.Linear(64, 2 * FACTORS))
        blur = (-2 * centres_of_pixels(PATCH + 1).square().sum(-1)).exp()
        self.filters.weight.data.copy_(blur.expand_as(self.filters.weight))

    def forward(self, x: Float[Tensor, "B S S"]) -> None:
        """The same arguments as the model's."""
        pixels = centres_of_pixels(SIDE).flatten(0, 1)
        prior = dist.Normal(CENTRES[:, None], SPREAD).to_event(1).log_prob(pixels)  # [T, S * S]
        response = self.filters(x[:, None]).flatten(2) + prior
        mean = response.softmax(-1) @ pixels  # [B, T, 2]
        seen = self.canvas(torch.cat([x.flatten(1), response.logsumexp(-1)], -1)).unflatten(1, (STEPS, 3))
        with pyro.plate("data", len(x)):
            present = torch.ones(len(x))
            for t in range(STEPS):
                there = seen[:, t, 0].sigmoid()
                # No wider than the prior: where no object is likely, little else keeps a width from running away.
                log_ratio = -F.softplus(1 + seen[:, t, 1:])
                present = pyro.sample(f"present_{t + 1}", dist.Bernoulli(there * present))
                posterior = (mean[:, t] - CENTRES[t]) / SPREAD, log_ratio
                where = _sample_if(present, f"where_{t + 1}", CENTRES[t], SPREAD, posterior)
                patch = glimpse(x[:, None], where).flatten(-3)
                zero, one = torch.zeros(FACTORS), torch.ones(FACTORS)
                _sample_if(present, f"what_{t + 1}", zero, one, self.patch(patch).chunk(2, -1))


def _sample_if(present: Tensor, name: str, loc: Tensor, scale: Tensor, posterior: Any) -> Tensor:
    """Draw from a posterior, given relative to the prior, where there is an object; else from the prior."""
    shift, log_ratio = (present[..., None] * part for part in posterior)
    value: Tensor = pyro.sample(name, dist.Normal(loc + scale * shift, scale * log_ratio.exp()).to_event(1))
    return value


def data(
    model: Scene, *, seed: int = 0
) -> tuple[Float[Tensor, "B S S"], Float[Tensor, "B T"], Float[Tensor, "B T 2"]]:
    """Let the model draw canvases; returns also which objects are there, and where they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(CANVASES, SIDE, SIDE))
    nodes: dict[str, Any] = trace.nodes
    present, where = (
        torch.stack([nodes[f"{name}_{t + 1}"]["value"] for t in range(STEPS)], 1) for name in ("present", "where")
    )
    return nodes["x"]["value"], present, where


def field(*, seed: int = 0) -> Field:
    """The program with canvases of its own making; only the guide is trained."""
    model = Scene()
    x, present, where = data(model, seed=seed)
    found = evidence(model.parts, x, present, where)
    return Field(
        model=model,
        guide=Inference(seed=seed),
        args=(x,),
        batch_plates=("data",),
        site=tuple(f"present_{t + 1}" for t in range(STEPS)),
        evidence=found.log_joint.logsumexp(1).sum().item(),
        error=found.error.square().sum().sqrt().item(),
        how=f"the number of objects summed, places by {DRAWS} importance samples for each canvas and number, and "
        "looks in closed form",
        learns_model=False,
    )
