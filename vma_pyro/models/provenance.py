"""Which programs weights belong to: what their classes say, and what they give on an example.

Weights are numbers for one program. Another likelihood, guide or layer of the same shapes takes them without a
word, and every figure after that is of no model at all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from vma_pyro._system.copied import copied
from vma_pyro.evaluation import undisturbed
from vma_pyro.infer.engine.distributions import innermost
from vma_pyro.memory import Memory
from vma_pyro.models.sources import changes, digest_sources

Probe = dict[str, float]  # "model x" and the like to a log probability, nats

TOLERANCE = 1e-5  # of the probe, relative; other machines round otherwise, by some 1e-6


def record_provenance(model: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """Note which programs weights belong to, for the file that the weights are kept in."""
    return {"sources": digest_sources(model, guide), "probe": probe(model, guide)}


def check_weights(saved: Mapping[str, Any] | None, model: nn.Module, guide: nn.Module, *, file: str) -> None:
    """Refuse weights that do not give with these programs what they gave with their own.

    Args:
        saved: what `record_provenance` said when they were saved; None for a file of before it did.
        model, guide: with the weights.
        file: where they are from, for the error.

    Raises:
        ValueError: another program.
    """
    if saved is not None and not _is_sound(saved):
        raise ValueError(f"checkpoint {file}: expected sources and a probe of its programs, got malformed ones")
    present = record_provenance(model, guide)
    if saved is None:
        kind = name_likelihood(model)
        if kind not in (None, "Bernoulli"):
            print(
                f"note: {file} does not say which likelihood it was trained with; here it is {kind}",
                file=sys.stderr,
            )
        return
    changed = changes(saved["sources"], present["sources"])
    because = f"{', '.join(changed)} changed since" if changed else "an argument or a weight is another one"
    if saved["probe"] is None:
        if changed:
            print(f"note: {file} was trained with other code: {because}", file=sys.stderr)
        return
    was, now = saved["probe"], present["probe"] or {}
    for site in (*(s for s in was if s not in now), *now):
        first, second = was.get(site), now.get(site)
        if first is None or second is None or not same(first, second):
            program, _, name = site.partition(" ")
            raise ValueError(
                f"checkpoint {file}: expected the {program} that it was trained with, whose site '{name}' has a "
                f"log probability of {shown(first)} on an example, got {shown(second)}; {because}: undo that, or "
                "train anew"
            )


def _is_sound(saved: Any) -> bool:
    """Whether what a file says has the form that `record_provenance` gives it."""
    if not isinstance(saved, dict) or not {"sources", "probe"} <= saved.keys():
        return False
    sources, probed = saved["sources"], saved["probe"]
    if not isinstance(sources, dict) or not isinstance(probed, dict | None):
        return False
    named = all(isinstance(key, str) and isinstance(value, str) for key, value in sources.items())
    return named and all(isinstance(k, str) and isinstance(v, int | float) for k, v in (probed or {}).items())


def same(first: float, second: float) -> bool:
    """Whether two log probabilities are equal but for rounding."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return str(first) == str(second)
    return abs(first - second) <= TOLERANCE * max(1.0, abs(first))


def shown(value: float | None) -> str:
    """Show a log probability in an error."""
    return "none" if value is None else f"{value:.3f}"


def with_weights(programs: nn.Module, weights: dict[str, Any]) -> Any:
    """Copy `elbo(model, guide)` with other weights, on the CPU, where all probes are taken."""
    found = copied(programs).cpu()
    found.load_state_dict(weights)
    return found


def probe(model: Any, guide: Any) -> Probe | None:
    """Score each site on fixed images, with latent ones at their means; None if that cannot be."""
    try:
        memory, x = example(model)
        with alone(model, guide), AtMeans():
            guide_trace = poutine.trace(guide).get_trace(memory, x)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(memory, x)
            found: Probe = {}
            for program, trace in (("guide", guide_trace), ("model", model_trace)):
                trace.compute_log_prob()
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and not site_is_subsample(site):
                        found[f"{program} {name}"] = float(site["log_prob_sum"])
    except Exception:  # programs of other arguments, or of other images
        return None
    return found


def name_likelihood(model: Any) -> str | None:
    """Name the kind of distribution of the site `x`; None if that cannot be."""
    try:
        memory, _ = example(model)
        with alone(model):
            return type(innermost(poutine.trace(model).get_trace(memory).nodes["x"]["fn"])).__name__
    except Exception:
        return None


@contextmanager
def alone(*programs: Any) -> Iterator[None]:
    """Run programs for a look at them, which changes neither them nor Pyro's store of parameters."""
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), undisturbed(*programs, seed=0):
        yield


def example(model: Any) -> tuple[Memory, Tensor]:
    """Make three entries and two images, the same everywhere."""
    shape = model.networks.image_shape
    device = next(iter(model.networks.parameters())).device
    count = 5 * math.prod(shape)
    images = (torch.arange(count, device=device) * 7919 % 101 < 20).float().reshape(5, *shape)
    return Memory(images[:3]), images[3:]


class AtMeans(Messenger):
    """Puts latent sites at their means, or at the first value of their support."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        fn = msg["fn"]
        if getattr(fn, "has_enumerate_support", False):
            msg["value"] = fn.enumerate_support(expand=True)[0]
        else:
            try:
                msg["value"] = fn.mean.expand(fn.batch_shape + fn.event_shape)
            except NotImplementedError:  # drawn, with the same seed
                return
