"""One update of an autoencoder with 200 bits: ours, through Pyro, against the same mathematics by hand.

Here effect handlers do not drown in convolutions. Ours is measured as `binary_vae.py` makes it, recorded once and
replayed, and with Pyro's Python in every update. All take turns, each with networks and optimizers of its own, on
the same batch. Before anything is timed, bound and gradients of ours are compared with the hand-written version's,
on the same noise.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from figures import BenchmarkConfig, write
from torch import Tensor

from common.timing import Spread, milliseconds, ratio, take_turns
from discrete_vae.programs import ARCHITECTURES, Programs, build
from discrete_vae.recorded import Recorded
from discrete_vae.runs import make_optimizers
from vma_pyro import cli
from vma_pyro._system.markdown import table
from vma_pyro.infer import make

ESTIMATORS = ("rloo", "disarm")
K = 2
OURS, EVERY, HAND = "ours, replayed", "ours, Pyro in every update", "by hand"


@dataclass(frozen=True)
class BinaryStepConfig(BenchmarkConfig):
    """Time one parameter update."""

    repetitions: int = 300
    """Updates of each."""


def log_bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    """Compute the log probability of bits, each its own."""
    return -F.binary_cross_entropy_with_logits(logits, value, reduction="none")


def by_hand(estimator: str, programs: Programs, x: Tensor) -> Tensor:
    """Minus the bound per image; its gradient is that of RLOO or of DisARM with two samples."""
    model: Any = programs.model
    guide: Any = programs.guide
    phi = guide.encoder(x - guide.mean)  # [B, 200]
    theta, both = phi.detach().sigmoid(), phi.expand(K, *phi.shape)
    if estimator == "rloo":
        b = torch.bernoulli(theta.expand(K, *theta.shape))
    else:
        u = torch.rand(1, *theta.shape)
        b = (torch.cat([1 - u, u]) < theta).to(theta.dtype)
    log_q = log_bernoulli(both, b)  # [K, B, 200]
    log_p = log_bernoulli(model.decoder(2 * b - 1), x.expand(K, *x.shape)).sum(-1)
    log_p = log_p + log_bernoulli(model.prior.expand_as(b), b).sum(-1)
    f = (log_p - log_q.sum(-1)).detach()
    if estimator == "rloo":
        score = ((f - f.flip(0)) * log_q.sum(-1)).mean(0).sum()
    else:
        weight = phi.detach().abs().sigmoid()
        score = ((f[0] - f[1]) * (weight * (log_q[0] - log_q[1])).sum(-1)).sum() / 2
    surrogate = log_p.mean(0).sum() + score
    return -(f.mean(0).sum() + surrogate - surrogate.detach()) / len(x)


def hand_gradient(estimator: str, programs: Programs, x: Tensor) -> Tensor:
    """Leave the gradient in the parameters, and return the loss."""
    for program in programs[:2]:
        program.zero_grad()
    loss = by_hand(estimator, programs, x)
    loss.backward()
    return loss.detach()


def contenders(estimator: str, mean: Tensor) -> dict[str, tuple[Programs, Any, Callable[[Tensor], Tensor]]]:
    """Programs with the same weights, the loss, and what leaves its gradient in their parameters."""
    found: dict[str, tuple[Programs, Any, Callable[[Tensor], Tensor]]] = {}
    for name, wait in ((OURS, 0), (EVERY, 10**9)):
        torch.manual_seed(0)
        programs = build(ARCHITECTURES["linear"], mean)
        loss_fn = make(estimator, K, site=programs.sites)(programs.model, programs.guide)
        found[name] = programs, loss_fn, Recorded(loss_fn, note=_refuse, wait=wait).gradient
    torch.manual_seed(0)
    programs = build(ARCHITECTURES["linear"], mean)
    loss_fn = make(estimator, K, site=programs.sites)(programs.model, programs.guide)  # for its parameters alone
    found[HAND] = programs, loss_fn, lambda x: hand_gradient(estimator, programs, x)
    return found


def _refuse(why: str) -> None:
    raise ValueError(why)


def difference(all_: dict[str, tuple[Programs, Any, Callable[[Tensor], Tensor]]], x: Tensor) -> float:
    """The largest relative difference of bounds and gradients on the same noise.

    Raises:
        ValueError: they do not compute the same.
    """
    computed = []
    for programs, _, gradient in all_.values():
        torch.manual_seed(7)
        loss = gradient(x)
        flat = [p.grad.flatten() for part in programs[:2] for p in part.parameters() if p.grad is not None]
        computed.append((loss.double(), torch.cat(flat).double()))
    expected_loss, expected = computed[-1]
    found = max(
        max(float((loss - expected_loss).abs() / expected_loss), float((g - expected).norm() / expected.norm()))
        for loss, g in computed[:-1]
    )
    if not found < 5e-5:  # of sums in float32
        raise ValueError(f"reference: expected the same bound and gradient to 5e-5, got {found:.2g}")
    return found


def measure(estimator: str, repetitions: int) -> dict[str, Any]:
    """Compare and time all of one estimator."""
    torch.manual_seed(1)
    mean = torch.rand(784) / 3
    x = (torch.rand(ARCHITECTURES["linear"].batch, 784) < mean).float()
    all_ = contenders(estimator, mean)
    same = difference(all_, x)

    def updates(name: str) -> Callable[[], None]:
        programs, loss_fn, gradient = all_[name]
        optimizers = make_optimizers(loss_fn, programs, "linear")

        def update() -> None:
            gradient(x)
            for optimizer in optimizers:
                optimizer.step()

        return update

    seconds = take_turns({name: updates(name) for name in all_}, repetitions=repetitions, label=estimator)
    return {
        "estimator": estimator,
        "difference": same,
        "milliseconds": {name: milliseconds(values) for name, values in seconds.items()},
        "ratios": {name: ratio(seconds[name], seconds[HAND])._asdict() for name in (OURS, EVERY)},
    }


def main(config: BinaryStepConfig) -> None:
    """Measure and write."""
    if config.tiny:
        config = replace(config, repetitions=2)
    rows = [measure(estimator, config.repetitions) for estimator in ESTIMATORS]
    lines = [
        [row["estimator"], *(Spread.read(row["milliseconds"][name]) for name in (OURS, EVERY, HAND))]
        + [Spread.read(row["ratios"][name]) for name in (OURS, EVERY)]
        for row in rows
    ]
    head = ["estimator", *(f"{name}, ms" for name in (OURS, EVERY, HAND))]
    about = (
        "200 bits, a linear map each way, batches of 50, K = 2; medians, quartiles in brackets. Bound and gradient"
        f" of ours and of the hand-written version were equal to {max(row['difference'] for row in rows):.0e} on "
        "the same noise."
    )
    parts = [about, table([*head, *(f"{name} / {HAND}" for name in (OURS, EVERY))], lines)]
    title = "One update of an autoencoder with 200 bits"
    write(config.output, "binary_step", title, {"rows": rows}, parts, device=torch.device("cpu"))


if __name__ == "__main__":
    cli.run(main, BinaryStepConfig, __doc__)
